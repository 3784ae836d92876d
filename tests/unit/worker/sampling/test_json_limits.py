"""Digits and nesting in JSON are bounded, and nothing else is."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.protocol import ToolUse
from common.schema import grammar
from tests.grammar_cases import allowed_ids
from tests.unit.worker.text.test_detokenizer import byte_level
from worker.sampling.grammar import GrammarCompiler, GrammarMatcher
from worker.sampling.json_limits import MAX_DIGITS, MAX_EXPONENT_DIGITS, MAX_LEVELS

END = 256


class Bytes:
    """The part of mlx-lm's tokenizer wrapper that `GrammarCompiler` uses: a token for each byte, an end token, and some more."""

    def __init__(self, *more: bytes) -> None:
        pieces = [byte_level(bytes([byte])) for byte in range(256)]
        self.detokenizer = SimpleNamespace(tokenmap=[*pieces, "<end>", *map(byte_level, more)])
        self.added_tokens_decoder = {END: "<end>"}

    def get_vocab(self) -> dict[str, int]:
        return {piece: i for i, piece in enumerate(self.detokenizer.tokenmap)}


COMPILER = GrammarCompiler(Bytes(), 300, [END])


def accepted(text: str, answer: str) -> str:
    """The part of an answer, one token a byte, up to the first that is not allowed; with "." if it may end there."""
    matcher = GrammarMatcher(COMPILER.compile(text))
    for i, byte in enumerate(answer.encode()):
        if byte not in allowed_ids(matcher):
            return answer.encode()[:i].decode()
        matcher.advance(byte)
    return answer + "." * (END in allowed_ids(matcher))


def of_schema(schema: Any, answer: str) -> str:
    """As `accepted`, for a schema."""
    return accepted(grammar.for_json_schema(schema), answer)


@pytest.mark.parametrize(
    ("answer", "part"),
    [
        ("1" * 50, "1" * MAX_DIGITS),
        ("-" + "1" * 50, "-" + "1" * MAX_DIGITS),
        ("0." + "0" * 50, "0." + "0" * MAX_DIGITS),
        ("1e" + "1" * 50, "1e" + "1" * MAX_EXPONENT_DIGITS),
        ("1.5E-" + "1" * 50, "1.5E-" + "1" * MAX_EXPONENT_DIGITS),
        ("[" * 100, "[" * MAX_LEVELS),
        ('{"a":' * 100, '{"a":' * MAX_LEVELS),
    ],
)
@pytest.mark.parametrize("schema", [True, {"anyOf": [True, {"type": "integer"}]}])
def test_bounded(schema: Any, answer: str, part: str) -> None:
    """A number and nesting end, where the schema alone has no end."""
    assert of_schema(schema, answer) == part


@pytest.mark.parametrize(
    "answer",
    [
        f'"{"1" * 50}"',
        f'"\\"{"1" * 50}"',
        f'"{"[" * 100}"',
        "[" + "1,2," * 60 + "3]",
        "[" + "[[]]," * 80 + "0]",
        f"[{'1' * MAX_DIGITS}.{'1' * MAX_DIGITS}e+308,{'1' * MAX_DIGITS}]",
        "[true, 123,false,1e5,123456]",
        '{"' + "1" * 50 + '":1}',
    ],
)
def test_not_bounded(answer: str) -> None:
    """Strings, names and the number of items are not bounded; each number has its own bound."""
    assert of_schema(True, answer) == answer + "."


@pytest.mark.parametrize(
    ("schema", "answer"),
    [
        ({"type": "string", "pattern": "^[0-9]{30}$"}, '"' + "1" * 30 + '"'),
        ({"enum": [9007199254740991, "1" * 40]}, '"' + "1" * 40 + '"'),
        ({"const": 1e25}, "1" + "0" * 25),
        ({"type": "number", "minimum": 0.25, "maximum": 0.25}, "0.25"),
        ({"type": "integer", "minimum": 10**17, "multipleOf": 7}, "700000000000000000"),
    ],
)
def test_what_a_schema_asks_for(schema: Any, answer: str) -> None:
    """Long values that a schema asks for are accepted."""
    assert of_schema(schema, answer) == answer + "."


def test_what_a_schema_requires_beyond_the_bounds() -> None:
    """A bound gives way if nothing else is allowed."""
    schema: Any = {"type": "integer"}
    for _ in range(MAX_LEVELS + 5):
        schema = {"type": "array", "items": schema, "minItems": 1}
    text = grammar.for_json_schema(schema)
    answer = "[" * (MAX_LEVELS + 5) + "1" + "]" * (MAX_LEVELS + 5)
    assert accepted(text, answer) == answer + "."


TOOLS = [
    {
        "type": "function",
        "function": {"name": "f2", "parameters": {"type": "object", "properties": {"n": {"type": "number"}}}},
    }
]


@pytest.mark.parametrize("is_required", [False, True])
def test_numbers_of_calls(is_required: bool) -> None:
    """The arguments of calls are bounded, the text before them is not."""
    text = grammar.for_tool_calls(ToolUse(tools=TOOLS, is_required=is_required))
    begin = ("" if is_required else '12" [[ ' + "1" * 50) + '<tool_call>{"name": "f2", "arguments": {"n": '
    assert accepted(text, begin + "1" * 50) == begin + "1" * MAX_DIGITS
    first = begin + "1}}</tool_call>"
    again = first + '\n<tool_call>{"name": "f2", "arguments": {"n": '
    assert accepted(text, again + "1" * 50) == again + "1" * MAX_DIGITS
    assert accepted(text, first) == first + "."


@pytest.mark.parametrize("has_tools", [False, True])
@pytest.mark.parametrize("answer", ["1" * 50 + "[" * 100, "0." + "1" * 30])
def test_regular_expressions_and_choices(answer: str, has_tools: bool) -> None:
    """An answer that need not be JSON is not bounded, also if calls are possible instead of it."""
    for text in (grammar.for_regex("[0-9.\\[]*x?"), grammar.for_choice([answer, answer + "x"])):
        held = grammar.for_tool_calls(ToolUse(tools=TOOLS), answer=text) if has_tools else text
        assert accepted(held, answer) == answer + "."


def test_tokens_of_several_digits() -> None:
    """A token with more digits than are left is not allowed, one with fewer is."""
    compiler = GrammarCompiler(Bytes(*(b"1" * n for n in range(2, 13))), 300, [END])
    matcher = GrammarMatcher(compiler.compile(grammar.for_json_schema({"type": "integer"})))
    for _ in range(15):
        matcher.advance(ord("1"))
    lengths = {len(compiler.tokens[i]) for i in allowed_ids(matcher) if compiler.tokens[i].isdigit()}
    assert lengths == {1, 2, 3, 4, 5}


NUMBERS = st.one_of(
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False, allow_infinity=False).filter(
        lambda x: not 0 < abs(x) < 1e-3 or "e" in repr(x)
    ),
    st.decimals(allow_nan=False, allow_infinity=False, places=6, min_value=-(10**12), max_value=10**12).map(
        float
    ),
)
VALUES = st.recursive(
    st.one_of(NUMBERS, st.text('ab1[\\"', max_size=8), st.booleans(), st.none()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text("ab1", max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.text("ab1", max_size=3), VALUES, max_size=4))
def test_any_ordinary_object_is_accepted(value: dict[str, Any]) -> None:
    """Any object with 64-bit numbers, as Python writes it, is still a possible answer, and may end there."""
    answer = json.dumps(value)
    assert accepted(grammar.for_json_object(), answer) == answer + "."
