"""An answer's text taken apart: what is content, what was thought, what is called, however the text was cut."""

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
)
from worker.text.answer_format import REASONING, ModelFormat
from worker.text.tool_calls import Part


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
def test_the_universal_form(text: str, expected: list[Part]) -> None:
    """Calls come out with their arguments as they were written; what is no call is text, and nothing of it is lost."""
    assert read(parser(PLAIN), text) == expected


def test_arguments_come_as_they_are_written() -> None:
    """The name as soon as it is whole, then each bit of the arguments, and nothing of the markers."""
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
def test_a_required_call_that_was_cut(text: str) -> None:
    """Of a call that has to be one, and is none yet when the length ends it, nothing is content."""
    for required in (parser(PLAIN, is_required=True), parser(PLAIN, function="f")):
        parts = [part for piece in text for part in required.feed(piece)]
        parts += required.flush(is_cut=True)
        assert not any(isinstance(part, str) for part in parts)
    assert read(parser(PLAIN), text, is_cut=True) == [text]


def test_arguments_that_were_cut() -> None:
    """What was written of them has come out already; nothing is made up for the rest."""
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
def test_the_models_own_form(text: str, expected: list[Part]) -> None:
    """Calls as mlx-lm's parser reads them; what it cannot read is text, markers included; thoughts without their borders."""
    assert read(parser(NATIVE), text) == expected


def test_a_call_without_its_end() -> None:
    """It is believed if the model ended there, and is text if the length did: it may lack arguments."""
    assert read(parser(NATIVE), "[CALL]f {}", is_cut=False) == call(0, "f", "{}")
    assert read(parser(NATIVE), "[CALL]f {}", is_cut=True) == ["[CALL]f {}"]


def test_a_format_without_an_end_marker() -> None:
    """Calls go to the end of the answer (Mistral); those that are whole count, whatever ended it."""
    for is_cut in (True, False):
        assert read(parser(NATIVE_WITHOUT_END), "Hi [CALLS]f {}\ng_2 {}", is_cut=is_cut) == [
            "Hi ",
            *call(0, "f", "{}"),
            *call(1, "g_2", "{}"),
        ]


def test_messages_with_headers() -> None:
    """Several messages in one answer (Muse Spark): headers are dropped, what is behind the last marker too."""
    text = "to=self|hm<eom> x to=user|Yes<eom>assistant to=f|<calls>f {}</calls>and<eot>dropped"
    assert read(parser(NATIVE_WITH_HEADERS), text) == [Reasoning("hm"), "Yes", *call(0, "f", "{}"), "and"]


def test_thinking_that_the_prompt_opened() -> None:
    """The answer begins with reasoning, though nothing in it says so."""
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
def test_one_call_only(model: ModelFormat, text: str) -> None:
    """Without parallel calls the first is the last, and the answer ends with it."""
    reader = parser(model, is_parallel=False)
    parts = read(reader, text)
    assert [type(part) for part in parts] == [str, ToolCall, ToolArguments]
    assert reader.has_call
    assert reader.is_finished == (model is not NATIVE_WITHOUT_END)


def test_text_that_only_looked_like_a_call_does_not_end_an_answer() -> None:
    """Though one call ends it: there was none."""
    reader = parser(NATIVE, is_parallel=False)
    assert read(reader, "[CALL]?[/CALL] and [CALL]f {}[/CALL]x") == [
        "[CALL]?[/CALL] and ",
        *call(0, "f", "{}"),
    ]


def test_only_the_named_function() -> None:
    """A call of another one is no call."""
    text = '<tool_call>{"name": "g_2", "arguments": {}}</tool_call>'
    assert read(parser(PLAIN, function="f", is_required=True), text) == [text]


def test_without_functions_calls_are_text() -> None:
    """A model that calls though it was given nothing to call has written text; thoughts are thoughts."""
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
def test_any_cut_gives_the_same(
    *, model: ModelFormat, text: str, cuts: list[int], is_cut: bool, is_parallel: bool, is_thinking: bool
) -> None:
    """Wherever token borders fall: a takeover reads on where another worker was, and streams equal whole answers."""
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
def test_nothing_is_lost_where_nothing_is_called(text: str) -> None:
    """Text that turns out to hold no call comes out as it was."""
    reader = parser(NATIVE)
    parts = read(reader, text)
    if not reader.has_call:
        assert parts == ([text] if text else [])


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.sampled_from([PLAIN, NATIVE, NATIVE_WITHOUT_END]))
def test_calls_are_well_formed(text: str, model: ModelFormat) -> None:
    """Indexes go up from 0, and each part of arguments belongs to the call that began last."""
    index = -1
    for part in read(parser(model), text):
        if isinstance(part, ToolCall):
            index += 1
            assert part.name in ("f", "g_2")
        if isinstance(part, ToolCall | ToolArguments):
            assert part.index == index
