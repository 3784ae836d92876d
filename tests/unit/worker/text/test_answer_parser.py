"""Answers split into content, reasoning and tool calls, however the text is cut into pieces."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.protocol import Reasoning, ToolArguments, ToolCall
from tests.unit.worker.text.answers import (
    HERMES_ARGUMENTS,
    HERMES_CALL,
    NATIVE,
    NATIVE_WITH_HEADERS,
    NATIVE_WITHOUT_END,
    PLAIN,
    call,
    parser,
    read,
    tool,
)
from worker.text.answer_format import REASONING, ModelFormat
from worker.text.tool_calls import CallableTools, HermesCallParser, Part


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain text", ["plain text"]),
        ("  \n text \n", ["  \n text \n"]),
        (" \n ", [" \n "]),
        ("a < b <tool_cal", ["a < b <tool_cal"]),
        (HERMES_CALL, call(0, "f", HERMES_ARGUMENTS)),
        (f"\n {HERMES_CALL} \n", call(0, "f", HERMES_ARGUMENTS)),
        (f"Look: {HERMES_CALL}", ["Look: ", *call(0, "f", HERMES_ARGUMENTS)]),
        (
            f'{HERMES_CALL}\n<tool_call>\n{{"name":"g_2","arguments":{{}}}}\n</tool_call> done',
            [*call(0, "f", HERMES_ARGUMENTS), *call(1, "g_2", "{}"), "done"],
        ),
        ('<tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call>', call(0, "f", '{"x": 1}')),
        ('<tool_call>{"name": "f", "parameters": {"x": 1}}</tool_call>', call(0, "f", '{"x": 1}')),
        (
            '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>',
            call(0, "f", '{"x": 1}'),
        ),
        (
            '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
            ['<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'],
        ),
        ("<tool_call>no JSON</tool_call> on", ["<tool_call>no JSON</tool_call> on"]),
        ('<tool_call>{"name": "f"', ['<tool_call>{"name": "f"']),
        (
            '<tool_call>[{"name": "f", "arguments": {}}, {"name": "g_2", "arguments": {}}]</tool_call>',
            [*call(0, "f", "{}"), *call(1, "g_2", "{}")],
        ),
        ("<think>a</think>", ["<think>a</think>"]),
    ],
)
def test_hermes_calls(text: str, expected: list[Part]) -> None:
    """Calls keep their arguments as generated; text that is not a call is content, and none of it is lost."""
    assert read(parser(PLAIN), text) == expected


def test_hermes_arguments_are_streamed() -> None:
    """The name as soon as it is complete, then each piece of the arguments, without markers."""
    reader = parser(PLAIN)
    texts = [
        "<tool_",
        "call>",
        '{"name": "f", "arg',
        'uments": ',
        '{"ci',
        'ty": "',
        "Bern",
        '"}',
        "}</tool",
        "_call>",
    ]
    assert [reader.feed(text) for text in texts] == [
        [],
        [],
        [],
        [],
        [ToolCall(0, "f"), ToolArguments(0, '{"ci')],
        [ToolArguments(0, 'ty": "')],
        [ToolArguments(0, "Bern")],
        [ToolArguments(0, '"}')],
        [],
        [],
    ]
    assert reader.flush(is_cut=False) == []


@pytest.mark.parametrize("text", ["<", "<tool_call>\n", '<tool_call>\n{"name": "f'])
def test_a_required_call_cut_before_its_arguments(text: str) -> None:
    """A fragment of a required call, cut by the length limit, is not content."""
    for required in (parser(PLAIN, is_required=True), parser(PLAIN, function="f")):
        parts = [part for piece in text for part in required.feed(piece)]
        parts += required.flush(is_cut=True)
        assert not any(isinstance(part, str) for part in parts)
    assert read(parser(PLAIN), text, is_cut=True) == [text]


def test_arguments_cut_by_the_length() -> None:
    """The arguments so far were already streamed; nothing is added to complete them."""
    text = '<tool_call>{"name": "f", "arguments": {"a": 1'
    assert read(parser(PLAIN), text, is_cut=True) == call(0, "f", '{"a": 1')


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", ["plain"]),
        ('[CALL]f {"a": "é"}[/CALL]', call(0, "f", '{"a": "é"}')),
        (
            'Well.\n[CALL]f {}[/CALL]\n[CALL]g_2 {"b": 2}[/CALL]\n',
            ["Well.\n", *call(0, "f", "{}"), *call(1, "g_2", '{"b": 2}')],
        ),
        (
            "[CALL]f {}\ng_2 {}[/CALL][CALL]f {}[/CALL]",
            [*call(0, "f", "{}"), *call(1, "g_2", "{}"), *call(2, "f", "{}")],
        ),
        ("[CALL]f {oops}[/CALL] more", ["[CALL]f {oops}[/CALL] more"]),
        ("[CALL]h {}[/CALL]", ["[CALL]h {}[/CALL]"]),
        ("[CALL]f []", ["[CALL]f []"]),
        ("[CALL]f {}", call(0, "f", "{}")),
        ('[CALL]f {"a": NaN}[/CALL]', ['[CALL]f {"a": NaN}[/CALL]']),
        ('[CALL]f {"a": "\\ud83c"}[/CALL]', call(0, "f", '{"a": "\\ud83c"}')),
        ("<think>\nHm. \n\n</think>\n\nYes.", [Reasoning("Hm."), "Yes."]),
        ("<think>\n\n</think>\n\nYes.", ["Yes."]),
        ("<think>a</think><think> b</think>c", [Reasoning("a\nb"), "c"]),
        ("<think>Hm. [CALL]f {}[/CALL]", [Reasoning("Hm."), *call(0, "f", "{}")]),
        ("<think>never </thi", [Reasoning("never </thi")]),
        (" <think>a</think>\n[CALL]f {}[/CALL]", [Reasoning("a"), *call(0, "f", "{}")]),
    ],
)
def test_native_calls(text: str, expected: list[Part]) -> None:
    """Calls as mlx-lm's parser returns them; text that it cannot parse is content, markers included; reasoning without its markers."""
    assert read(parser(NATIVE), text) == expected


def test_a_native_call_without_its_end_marker() -> None:
    """It is a call if the model ended there, and content if the length limit did: arguments may be missing."""
    assert read(parser(NATIVE), "[CALL]f {}", is_cut=False) == call(0, "f", "{}")
    assert read(parser(NATIVE), "[CALL]f {}", is_cut=True) == ["[CALL]f {}"]


def test_a_native_format_without_an_end_marker() -> None:
    """Calls extend to the end of the answer (Mistral); complete ones count, whatever ended the answer."""
    for is_cut in (True, False):
        assert read(parser(NATIVE_WITHOUT_END), "Hi [CALLS]f {}\ng_2 {}", is_cut=is_cut) == [
            "Hi ",
            *call(0, "f", "{}"),
            *call(1, "g_2", "{}"),
        ]


def test_messages_with_headers() -> None:
    """Several messages in one answer (Muse Spark): headers are dropped, and so is text after the last marker."""
    text = "to=self|hm<eom> x to=user|Yes<eom>assistant to=f|<calls>f {}</calls>and<eot>dropped"
    assert read(parser(NATIVE_WITH_HEADERS), text) == [Reasoning("hm"), "Yes", *call(0, "f", "{}"), "and"]


def test_reasoning_opened_by_the_prompt() -> None:
    """The answer begins with reasoning, without a marker of its own."""
    reader = parser(NATIVE, REASONING)
    assert reader.is_reasoning
    assert read(reader, "Hm.\n</think>\n\nYes.") == [Reasoning("Hm."), "Yes."]
    assert not reader.is_reasoning


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (PLAIN, f"Well. {HERMES_CALL}{HERMES_CALL}more"),
        (PLAIN, f"Well. {HERMES_CALL}more"),
        (NATIVE, "Well. [CALL]f {}[/CALL][CALL]g_2 {}[/CALL]"),
        (NATIVE, "Well. [CALL]f {}\ng_2 {}[/CALL]"),
        (NATIVE_WITHOUT_END, "Well. [CALLS]f {}\ng_2 {}"),
    ],
)
def test_a_single_call(model: ModelFormat, text: str) -> None:
    """Without parallel calls the first call ends the answer."""
    reader = parser(model, is_parallel=False)
    parts = read(reader, text)
    assert [type(part) for part in parts] == [str, ToolCall, ToolArguments]
    assert reader.has_call
    assert reader.is_finished == (model is not NATIVE_WITHOUT_END)


def test_text_that_looks_like_a_call_does_not_end_an_answer() -> None:
    """Even if one call would end it."""
    reader = parser(NATIVE, is_parallel=False)
    assert read(reader, "[CALL]?[/CALL] and [CALL]f {}[/CALL]x") == [
        "[CALL]?[/CALL] and ",
        *call(0, "f", "{}"),
    ]


def test_only_the_named_function() -> None:
    """A call of another function is content."""
    text = '<tool_call>{"name": "g_2", "arguments": {}}</tool_call>'
    assert read(parser(PLAIN, function="f", is_required=True), text) == [text]


def test_without_tools_calls_are_content() -> None:
    """A model that makes a call without having tools has generated content; reasoning is still split off."""
    text = "<think>a</think>[CALL]f {}[/CALL]"
    assert read(parser(NATIVE, tools=False), text) == [Reasoning("a"), "[CALL]f {}[/CALL]"]


FRAGMENTS = [
    *'<>[]{}"\\ \n',
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "[CALL]",
    "[/CALL]",
    "[CALLS]",
    "to=user|",
    "to=self|",
    "<eom>",
    "<eot>",
    "<calls>",
    "</calls>",
    '{"name": "f", "arguments": {',
    '{"name": "h", "arguments": {',
    '{"arguments": {}, "name": "g_2"}',
    "f {}",
    '"a": "b"}}',
    "text",
    " é🌊 ",
]
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)


@settings(max_examples=600, deadline=None)
@given(
    model=st.sampled_from([PLAIN, NATIVE, NATIVE_WITHOUT_END, NATIVE_WITH_HEADERS]),
    text=TEXTS,
    cuts=st.lists(st.integers(0, 200)),
    is_cut=st.booleans(),
    is_parallel=st.booleans(),
    is_thinking=st.booleans(),
)
@example(
    model=PLAIN,
    text=HERMES_CALL * 2,
    cuts=list(range(150)),
    is_cut=False,
    is_parallel=True,
    is_thinking=False,
)
@example(
    model=PLAIN,
    text='<tool_call>{"name": "h", "arguments": {"a": 1}}</tool_call>',
    cuts=list(range(99)),
    is_cut=False,
    is_parallel=True,
    is_thinking=False,
)
def test_the_result_does_not_depend_on_the_cuts(
    *, model: ModelFormat, text: str, cuts: list[int], is_cut: bool, is_parallel: bool, is_thinking: bool
) -> None:
    """Whatever the token boundaries: a takeover continues another worker's answer, and a stream equals a complete response."""
    state = REASONING if is_thinking else model.initial_state
    borders = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in pairwise(borders)]
    once, often = (parser(model, state, is_parallel=is_parallel) for _ in range(2))
    assert read(once, text, is_cut=is_cut) == read(often, *pieces, is_cut=is_cut)
    assert (once.has_call, once.is_finished, once.is_reasoning) == (
        often.has_call,
        often.is_finished,
        often.is_reasoning,
    )


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([f for f in FRAGMENTS if "think" not in f]), max_size=12).map("".join))
def test_text_without_calls_is_preserved(text: str) -> None:
    """Text that turns out to hold no call is released unchanged."""
    reader = parser(NATIVE)
    parts = read(reader, text)
    if not reader.has_call:
        assert parts == ([text] if text else [])


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.sampled_from([PLAIN, NATIVE, NATIVE_WITHOUT_END]))
def test_calls_are_well_formed(text: str, model: ModelFormat) -> None:
    """Indices count up from 0, and arguments belong to the call that began last."""
    index = -1
    for part in read(parser(model), text):
        if isinstance(part, ToolCall):
            index += 1
            assert part.name in ("f", "g_2")
        if isinstance(part, ToolCall | ToolArguments):
            assert part.index == index


@pytest.mark.parametrize("name", ["mcp.files/read", "a:b@c", "f-1"])
def test_arguments_are_streamed_whatever_the_name_is(name: str) -> None:
    """Names of MCP servers' tools have dots, slashes and colons: their arguments do not wait for the end of the call."""
    parsed = HermesCallParser("<tool_call>", CallableTools([tool(name)]), 0)
    result = parsed.feed(f'\n{{"name": "{name}", "arguments": {{"a": ')
    assert result.parts == [ToolCall(0, name), ToolArguments(0, '{"a": ')]
