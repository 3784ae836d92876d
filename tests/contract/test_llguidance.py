"""llguidance 1.9: what `common/schema/` and `worker/sampling/grammar.py` rely on, and the shortcomings that they work around.

The vocabulary is the 256 bytes and an end token, as in `common/schema/grammar.py`.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

END = 256


class Bytes:
    """The attributes that `TokenizerWrapper` reads."""

    eos_token_id = END
    bos_token_id = None
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")
    special_token_ids = (END,)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


@pytest.fixture(scope="module")
def tokenizer() -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(Bytes()), eos_token=END, slices=[])


def _matcher(tokenizer: LLTokenizer, schema: Any, **options: Any) -> LLMatcher:
    grammar = json.dumps({"grammars": [{"name": "answer", "json_schema": schema}]})
    return LLMatcher(tokenizer, grammar, log_level=0, **options)


def _accepts(tokenizer: LLTokenizer, schema: Any, text: str) -> bool:
    matcher = _matcher(tokenizer, schema)
    assert not matcher.is_error(), matcher.get_error()
    return all(matcher.consume_token(byte) for byte in text.encode()) and bool(matcher.is_accepting())


def test_limits(tokenizer: LLTokenizer) -> None:
    """A grammar's cost is bounded by these, in the API and in a worker. Open common/schema/grammar.py, `limits`."""
    names = (
        "max_items_in_row",
        "initial_lexer_fuel",
        "step_lexer_fuel",
        "step_max_items",
        "max_lexer_states",
    )
    limits = LLParserLimits(**dict.fromkeys(names, 10_000), max_grammar_size=10, verbose_errors=False)
    schema = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(50)}}
    assert _matcher(tokenizer, schema, limits=limits).is_error()


def test_matcher(tokenizer: LLTokenizer) -> None:
    """The calls that a sequence's matcher has to support, step by step. Open worker/sampling/grammar.py, `Matcher`."""
    start = _matcher(tokenizer, {"enum": ["a"]})
    matcher = start.deep_copy()
    assert not matcher.is_stopped()
    for byte in b'"a':
        assert matcher.consume_token(byte)
    assert not matcher.is_accepting()
    assert matcher.deep_copy().consume_token(ord("b")) is False
    words = np.zeros(-(-(END + 1) // 32), np.uint32)
    matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
    allowed = np.unpackbits(words.view(np.uint8), bitorder="little").nonzero()[0].tolist()
    assert allowed == [ord('"')]
    assert matcher.consume_token(ord('"'))
    assert matcher.is_accepting()
    assert not start.is_accepting(), "the original of the copy has not advanced"
    assert any(start.compute_bitmask())


def test_end_of_text_only_without_choice(tokenizer: LLTokenizer) -> None:
    """Only one of the end-of-text tokens is allowed, and only if nothing else may follow. Open worker/sampling/grammar.py, `fill`."""
    matcher = _matcher(tokenizer, {"enum": ["a"]})
    for byte in b'"a"':
        matcher.consume_token(byte)
    assert matcher.is_stopped() or bytes(matcher.compute_bitmask())[END // 8] & 1


@pytest.mark.parametrize(
    ("schema", "beginning"),
    [
        ({"anyOf": []}, "Unsatisfiable schema: anyOf is empty"),
        ({"type": "object", "uniqueItems": True, "not": {"type": "null"}}, "Unimplemented keys: "),
        ({"oneOf": [{"type": "string"}, {"type": "string"}]}, "oneOf"),
    ],
)
def test_messages(tokenizer: LLTokenizer, schema: Any, beginning: str) -> None:
    """The beginnings of the messages that are reworded for clients. Open common/schema/grammar.py, `_explained`."""
    limits = LLParserLimits(verbose_errors=False)
    matcher = _matcher(tokenizer, schema, limits=limits)
    assert matcher.is_error()
    assert matcher.get_error().replace("<non-verbose/>", "").startswith(beginning)


def test_white_space_is_an_option_of_a_schema(tokenizer: LLTokenizer) -> None:
    """`x-guidance` in a schema bounds white space: otherwise small models would write nothing else. Open common/schema/grammar.py, `_WHITESPACE`."""
    options = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
    schema = {"type": "array", "items": {"type": "integer"}, "x-guidance": options}
    assert _accepts(tokenizer, schema, "[1, 2,3]")
    assert not _accepts(tokenizer, schema, "[1,  2]")


def test_excluded_bounds(tokenizer: LLTokenizer) -> None:
    """An exclusive bound is allowed if the range is narrow; `_replace_exclusive_bounds` works around it. If this fails, it can go.

    Open common/schema/json_schema.py.
    """
    schema = {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}
    assert _accepts(tokenizer, schema, "0")
    assert not _accepts(tokenizer, schema, "0.6")


@pytest.mark.parametrize(("pattern", "text"), [('^[^"]*$', r'"\""'), (r"^[^\\]*$", r'"\\"')])
def test_negated_classes(tokenizer: LLTokenizer, pattern: str, text: str) -> None:
    """A negated class allows an escaped quote or backslash that it excludes. If this fails, `_without_controls` can go.

    Open common/schema/json_schema.py.
    """
    assert _accepts(tokenizer, {"type": "string", "pattern": pattern}, text)


def test_lark(tokenizer: LLTokenizer) -> None:
    """Function calls are a Lark grammar with lazy text, negated terminals, and references to other grammars by `@name`.

    Open common/schema/grammar.py, `for_tool_calls`.
    """
    lark = 'start: until call\nuntil[lazy]: /(?s:.*)<call>/\ncall: @arguments "</call>"\nTEXT: /(?s:.*)/ & ~/(?s:.*)x(?s:.*)/\n'
    grammars = [
        {"name": "calls", "lark_grammar": lark},
        {"name": "arguments", "json_schema": {"type": "object", "additionalProperties": False}},
    ]
    matcher = LLMatcher(tokenizer, json.dumps({"grammars": grammars}), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    assert all(matcher.consume_token(byte) for byte in b"so<call>{}</call>")
    assert matcher.is_accepting()
