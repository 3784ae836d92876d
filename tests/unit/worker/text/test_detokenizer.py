"""Token ids to text, one token at a time, for each family of vocabularies."""

from __future__ import annotations

import codecs
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.text.detokenizer import TokenBytes


class Streaming:
    """The attributes of mlx-lm's streaming detokenizers that `TokenBytes` reads."""

    def __init__(self, tokenmap: list[Any], *, trim_space: bool | None = None) -> None:
        self.tokenmap = tokenmap
        if trim_space is not None:
            self.trim_space = trim_space


class Tokenizer:
    """The part of mlx-lm's wrapper that `TokenBytes` uses."""

    def __init__(self, streaming: Any, added: dict[int, str] | None = None) -> None:
        self.detokenizer = streaming
        self.added_tokens_decoder = added or {}

    def decode(self, ids: list[int]) -> str:
        return "".join(f"<{i}>" for i in ids)


def byte_level(data: bytes) -> str:
    """A token as byte-level BPE represents it, by GPT-2's own algorithm, which the code inverts."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    table, extra = {}, 0
    for byte in range(256):
        if byte in printable:
            table[byte] = chr(byte)
        else:
            table[byte] = chr(256 + extra)
            extra += 1
    return "".join(table[byte] for byte in data)


ALL_BYTES = TokenBytes(Tokenizer(Streaming([byte_level(bytes([byte])) for byte in range(256)])))


@given(st.text())
def test_text_from_single_bytes(text: str) -> None:
    """Any text, one byte per token: nothing is lost, and an incomplete character is never emitted."""
    detokenizer = ALL_BYTES.new_detokenizer(after_template=True)
    pieces = [detokenizer.add(byte) for byte in text.encode()]
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.flush() == text


@given(st.binary(max_size=40))
def test_invalid_utf8(data: bytes) -> None:
    """Invalid UTF-8 becomes U+FFFD as in Python, but an incomplete character at the end nothing; the same ids give the same text again."""

    def run() -> str:
        detokenizer = ALL_BYTES.new_detokenizer(after_template=False)
        return "".join(detokenizer.add(byte) for byte in data) + detokenizer.flush()

    assert run() == run() == codecs.getincrementaldecoder("utf-8")("replace").decode(data)


def test_an_incomplete_character_at_the_end() -> None:
    """A text that ends inside a character ends before it."""
    detokenizer = ALL_BYTES.new_detokenizer(after_template=True)
    assert [detokenizer.add(byte) for byte in "a🌊".encode()[:4]] == ["a", "", "", ""]
    assert detokenizer.flush() == ""


@pytest.mark.parametrize(
    ("held", "text"), [("b\ufffd", "b"), ("b\ufffd\ufffd\ufffd", "b"), ("\ufffdb", "\ufffdb"), ("b", "b")]
)
def test_mlx_lms_detokenizer_holds_an_incomplete_character(held: str, text: str) -> None:
    """The replacements that it appends to what it held, one or one per byte, are dropped; others stay."""

    class Holding:
        last_segment = ""

        def reset(self) -> None:
            pass

        def finalize(self) -> None:
            self.last_segment = held

    assert TokenBytes(Tokenizer(Holding())).new_detokenizer(after_template=True).flush() == text


def test_a_byte_level_leading_space_is_kept() -> None:
    """A completion continues its prompt: its first space is text."""
    tokens = TokenBytes(Tokenizer(Streaming([byte_level(b" Paris")])))
    assert tokens.new_detokenizer(after_template=False).add(0) == " Paris"


def test_added_tokens() -> None:
    """An added token is not decoded with the byte alphabet, even if its characters are in it."""
    tokens = TokenBytes(Tokenizer(Streaming([byte_level(b"a"), "é"]), added={1: "é"}))
    assert tokens[1] == "é".encode()


def test_a_padded_vocabulary() -> None:
    """A model may sample ids that its tokenizer does not have; they have no text."""
    assert ALL_BYTES[1000] == b""


def test_sentencepiece() -> None:
    """Its marker is a space, and only after a template the first one is dropped; byte tokens combine to characters."""
    pieces = ["\u2581Hello".encode(), "\u2581you".encode(), b"\xf0", b"\x9f", b"\x8c", b"\x8a"]
    tokens = TokenBytes(Tokenizer(Streaming(pieces, trim_space=True)))
    chat, plain = tokens.new_detokenizer(after_template=True), tokens.new_detokenizer(after_template=False)
    assert [chat.add(0), chat.add(1)] == ["Hello", " you"]
    assert [plain.add(0), plain.add(1)] == [" Hello", " you"]
    assert [chat.add(i) for i in (2, 3, 4, 5)] == ["", "", "", "🌊"]


def test_other_vocabularies_use_mlx_lm() -> None:
    """A tokenizer without a table of pieces uses mlx-lm's own detokenizer, a copy per sequence."""

    class Naive:
        def __init__(self) -> None:
            self.reset()

        def reset(self) -> None:
            self.segment = ""

        def add_token(self, token: int) -> None:
            self.segment = f"[{token}]"

        def finalize(self) -> None:
            self.segment = "end"

        @property
        def last_segment(self) -> str:
            return self.segment

    tokens = TokenBytes(Tokenizer(Naive()))
    first, second = tokens.new_detokenizer(after_template=True), tokens.new_detokenizer(after_template=True)
    assert (first.add(1), second.add(2), first.flush()) == ("[1]", "[2]", "end")
    assert tokens[5] == b"<5>"
