"""The format of tool calls in an answer, the grammar of the answer, and the state in which it begins."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from common.protocol import ChatPrompt, GenerationJob, Reasoning, TextPrompt, ToolUse
from common.schema import grammar
from tests.unit.worker.text.answers import (
    HERMES_ARGUMENTS,
    HERMES_CALL,
    NATIVE,
    NATIVE_WITH_HEADERS,
    PLAIN,
    TEMPLATE,
    THINKING,
    TOOLS,
    call,
    job,
    parse_native,
    read,
    tool,
)
from worker.text import answer_format, answer_parser
from worker.text.answer_format import TOOL, CallFormat, ModelFormat, choose_call_format


def test_which_answers_have_a_parser() -> None:
    """Chats with tools or with a reasoning model; plain prompts and plain models have only content."""
    ids = [ord(char) for char in "<think>\n"]
    letters: Any = [bytes([i]) for i in range(128)]
    assert answer_parser.make_parser(job(tools=False), PLAIN, ids, letters) is None
    assert answer_parser.make_parser(job(), PLAIN, ids, letters) is not None
    thinking = answer_parser.make_parser(job(tools=False), NATIVE, ids, letters)
    assert thinking is not None
    assert thinking.is_reasoning
    closed = answer_parser.make_parser(job(tools=False), NATIVE, [*ids, ord("x")], letters)
    assert closed is not None
    assert not closed.is_reasoning
    text = GenerationJob(job_id="a", model="m", channel="c", prompt=TextPrompt("<think>"))
    assert answer_parser.make_parser(text, NATIVE, ids, letters) is None


@pytest.mark.parametrize(
    ("model", "use", "text", "expected"),
    [
        (NATIVE, None, None, CallFormat.NONE),
        (NATIVE, {"tools": []}, None, CallFormat.NONE),
        (NATIVE, {"tools": TOOLS, "is_required": True}, None, CallFormat.HERMES),
        (NATIVE, {"tools": TOOLS, "is_required": True, "function": "f"}, None, CallFormat.HERMES),
        (NATIVE, {"tools": [tool("f"), tool("g", strict=True)]}, None, CallFormat.HERMES),
        (NATIVE, {"tools": [tool("f", strict=False)]}, None, CallFormat.NATIVE),
        (NATIVE, {"tools": TOOLS}, "a grammar", CallFormat.HERMES),
        (NATIVE, {"tools": TOOLS}, None, CallFormat.NATIVE),
        (PLAIN, {"tools": TOOLS}, None, CallFormat.HERMES),
        (ModelFormat(NATIVE.transitions, parse_call=parse_native), {"tools": TOOLS}, None, CallFormat.HERMES),
        (ModelFormat(template=TEMPLATE), {"tools": TOOLS}, None, CallFormat.HERMES),
    ],
)
def test_choose_call_format(model: ModelFormat, use: Any, text: str | None, expected: CallFormat) -> None:
    """The native format if the model has one and nothing must be enforced; otherwise the Hermes format."""
    asked = GenerationJob(
        job_id="a",
        model="m",
        channel="c",
        prompt=ChatPrompt([]),
        tool_use=use and ToolUse(**use),
        grammar=text,
    )
    assert choose_call_format(asked, model) is expected
    assert TOOL not in model.transitions


def test_answer_grammar() -> None:
    """Hermes calls add a grammar; native calls keep the job's; a schema that is too complex becomes any object."""
    assert answer_format.answer_grammar(job(), NATIVE) is None
    assert answer_format.answer_grammar(job(tools=False), PLAIN) is None
    odd = tool("odd", parameters={"type": "object", "properties": {"a": {"not": {"type": "string"}}}})
    asked = msgspec.structs.replace(job(), tool_use=ToolUse(tools=[*TOOLS, odd], is_required=True))
    text = answer_format.answer_grammar(asked, NATIVE)
    assert text is not None
    assert grammar.check(text) is None
    assert "odd" in text
    assert "not" not in json.dumps([g.get("json_schema") for g in json.loads(text)["grammars"]])


def test_initial_state() -> None:
    """After a header, unless a grammar excludes one; in reasoning, if the prompt opened it."""
    letters: Any = [bytes([i]) for i in range(128)]
    required = answer_parser.make_parser(job(is_required=True), NATIVE_WITH_HEADERS, [65], letters)
    assert required is not None
    assert read(required, HERMES_CALL) == call(0, "f", HERMES_ARGUMENTS)
    may = answer_parser.make_parser(
        job(), ModelFormat(NATIVE_WITH_HEADERS.transitions, "header"), [65], letters
    )
    assert may is not None
    assert read(may, f"to=user|Yes {HERMES_CALL}") == ["Yes ", *call(0, "f", HERMES_ARGUMENTS)]
    thinking = ModelFormat(THINKING, think_start="<think>", think_start_ids=tuple(map(ord, "<think>")))
    opened = answer_parser.make_parser(job(), thinking, [ord(c) for c in "<think>"], letters)
    assert opened is not None
    assert read(opened, f"I could <tool_call>, hm.</think>{HERMES_CALL}") == [
        Reasoning("I could <tool_call>, hm."),
        *call(0, "f", HERMES_ARGUMENTS),
    ]
