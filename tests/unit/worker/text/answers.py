"""Formats of models that reason and call tools, and helpers that parse an answer; for the tests of `worker.text`."""

from __future__ import annotations

import json
from typing import Any

from common.protocol import ChatPrompt, GenerationJob, Reasoning, ToolArguments, ToolCall, ToolUse
from worker.text.answer_format import NORMAL, REASONING, ModelFormat
from worker.text.answer_parser import AnswerParser
from worker.text.templates.support import TemplateSupport
from worker.text.tool_calls import Part

TEMPLATE = TemplateSupport(renders_tools=True)


def tool(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name} | more}


TOOLS = [tool("f"), tool("g_2")]


def parse_native(text: str, tools: list[dict[str, Any]]) -> Any:
    """A native format of the tests: one call per line, ``name args``."""
    assert tools == TOOLS
    calls = []
    for line in text.strip().splitlines():
        name, _, arguments = line.partition(" ")
        calls.append({"name": name, "arguments": json.loads(arguments)})
    return calls[0] if len(calls) == 1 else calls


THINKING = {NORMAL: [("<think>", REASONING)], REASONING: [("</think>", NORMAL)]}
PLAIN = ModelFormat()
NATIVE = ModelFormat(
    THINKING,
    call_starts={NORMAL: ["[CALL]"], REASONING: ["[CALL]"]},
    call_ends=[("[/CALL]", NORMAL)],
    parse_call=parse_native,
    think_start="<think>",
    template=TEMPLATE,
    think_start_ids=tuple(map(ord, "<think>")),
)
NATIVE_WITHOUT_END = ModelFormat(
    call_starts={NORMAL: ["[CALLS]"]}, parse_call=parse_native, template=TEMPLATE
)
NATIVE_WITH_HEADERS = ModelFormat(
    {
        "header": [("to=self|", REASONING), ("to=user|", NORMAL)],
        REASONING: [("<eom>", "header")],
        NORMAL: [("<eom>", "header"), ("<eot>", None)],
    },
    initial_state="header",
    call_starts={"header": ["<calls>"]},
    call_ends=[("</calls>", NORMAL)],
    parse_call=parse_native,
    template=TEMPLATE,
)


def job(*, tools: bool = True, **use: Any) -> GenerationJob:
    return GenerationJob(
        job_id="a",
        model="m",
        channel="c",
        prompt=ChatPrompt([{"role": "user", "content": "hi"}]),
        tool_use=ToolUse(tools=TOOLS, **use) if tools else None,
    )


def parser(model: ModelFormat, state: str | None = None, **use: Any) -> AnswerParser:
    return AnswerParser(job(**use), model, state or model.initial_state)


def merged(parts: list[Part]) -> list[Part]:
    """Join adjacent parts of the same kind."""
    joined: list[Any] = []
    for part in parts:
        last = joined[-1] if joined else None
        if isinstance(part, str) and isinstance(last, str):
            joined[-1] = last + part
        elif isinstance(part, Reasoning) and isinstance(last, Reasoning):
            joined[-1] = Reasoning(last.text + part.text)
        elif isinstance(part, ToolArguments) and isinstance(last, ToolArguments) and part.index == last.index:
            joined[-1] = ToolArguments(part.index, last.text + part.text)
        else:
            joined.append(part)
    return joined


def read(reader: AnswerParser, *texts: str, is_cut: bool = False) -> list[Part]:
    parts = [part for text in texts for part in reader.feed(text)]
    return merged(parts + reader.flush(is_cut=is_cut))


def call(index: int, name: str, arguments: str) -> list[Part]:
    return [ToolCall(index, name), ToolArguments(index, arguments)]


HERMES_CALL = '<tool_call>{"name": "f", "arguments": {"a": "}]</tool_call>\\""}}</tool_call>'
HERMES_ARGUMENTS = '{"a": "}]</tool_call>\\""}'
