"""Token ids to text, one token at a time, for each family of vocabularies."""

from __future__ import annotations

import codecs
from typing import Any

import pytest
from hypothesis import example, given
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


@given(
    st.lists(st.one_of(st.text(min_size=1).map(str.encode), st.binary(min_size=1, max_size=5)), max_size=12)
)
def test_tokens_of_any_length(tokens: list[bytes]) -> None:
    """Complete characters, halves of them and invalid bytes in any order: the text is that of all bytes together, as early as possible."""
    token_bytes = TokenBytes(Tokenizer(Streaming([byte_level(token) for token in tokens] or ["a"])))
    detokenizer = token_bytes.new_detokenizer(after_template=False)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for _ in range(2):  # the second time, the texts of tokens are known
        for token_id, token in enumerate(tokens):
            assert detokenizer.add(token_id) == decoder.decode(token)
            assert detokenizer.is_inside_character == bool(decoder.getstate()[0])


def test_an_incomplete_character_at_the_end() -> None:
    """A text that ends inside a character ends before it."""
    detokenizer = ALL_BYTES.new_detokenizer(after_template=True)
    assert [detokenizer.add(byte) for byte in "a🌊".encode()[:4]] == ["a", "", "", ""]
    assert detokenizer.flush() == ""


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


class Decoding(Tokenizer):
    """A tokenizer without a table of pieces, whose token ids are bytes. It has no other ids, and counts the tokens that it decodes."""

    def __init__(self, *, cleans_spaces: bool = False) -> None:
        super().__init__(object())
        self.num_decoded = 0
        self._cleans_spaces = cleans_spaces

    def get_vocab(self) -> dict[str, int]:
        return {str(byte): byte for byte in range(256)}

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        self.num_decoded += len(ids)
        text = bytes(ids).decode(errors="replace")
        return text.replace(" ,", ",") if self._cleans_spaces else text


def _decode_each(tokenizer: Decoding, data: bytes) -> list[str]:
    detokenizer = TokenBytes(tokenizer).new_detokenizer(after_template=True)
    return [*(detokenizer.add(byte) for byte in data), detokenizer.flush()]


@given(st.text(max_size=200))
def test_a_decoded_text(text: str) -> None:
    """A tokenizer that can only decode gives the same text token by token, and never an incomplete character."""
    pieces = _decode_each(Decoding(), text.encode())
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == text[: len(text) - min(3, len(text) - len(text.rstrip("\ufffd")))]


@given(
    st.lists(
        st.sampled_from([b"a", b"\x80", b"\xe2", b"\x82", b"\xf0\x9f", b"\x8c\x8a", b" ", b"\n"]),
        max_size=150,
    )
)
def test_decoded_bytes_that_are_no_text(parts: list[bytes]) -> None:
    """Invalid UTF-8 is U+FFFD as in the whole text; at the end it may be an incomplete character, which is dropped."""
    whole = b"".join(parts).decode(errors="replace")
    num_dropped = min(3, len(whole) - len(whole.rstrip("\ufffd")))
    assert "".join(_decode_each(Decoding(), b"".join(parts))) == whole[: len(whole) - num_dropped]


class ByteFallback(Decoding):
    """Decodes as the Rust tokenizers' `ByteFallback`: if adjacent bytes are not UTF-8 together, each of them is U+FFFD."""

    def decode(self, ids: list[int]) -> str:
        self.num_decoded += len(ids)
        try:
            return bytes(ids).decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(ids)


@given(st.text(st.characters(exclude_characters="\ufffd", codec="utf-8"), max_size=60))
@example("👩\u200d👩\u200d👧")
def test_adjacent_characters_made_of_bytes(text: str) -> None:
    """While a character is incomplete, the decoded text no longer begins with the one before it; nothing is lost, and none appears twice."""
    assert "".join(_decode_each(ByteFallback(), text.encode())) == text
    incomplete = _decode_each(ByteFallback(), (text + "🌊").encode()[:-1])
    assert "".join(incomplete) == text


def test_adjacent_bytes_that_are_no_text() -> None:
    """What can no longer become a character is not held."""
    pieces = _decode_each(ByteFallback(), b"ab\x80" + b"c" * 7)
    assert pieces[:2] == ["a", "b"]
    assert len("".join(pieces)) >= 7


def test_the_cost_of_characters_made_of_bytes_is_bounded() -> None:
    """The eighth last token is always inside a character here: the window is cut at another one."""
    tokenizer, data = ByteFallback(), 500 * "\u200d👩".encode()
    _decode_each(tokenizer, data)
    assert tokenizer.num_decoded < 40 * len(data)


@pytest.mark.parametrize("data", [b"abcd", b"\x80", b"\xe2\x82", b"\xf0\x9f\x8c\x8a", b"a ,"])
def test_the_cost_of_a_token_is_bounded(data: bytes) -> None:
    """A line may be as long as the answer, and a character may never be complete: the cost of a token stays the same."""
    tokenizer = Decoding(cleans_spaces=b"," in data)
    _decode_each(tokenizer, 1000 * data)
    assert tokenizer.num_decoded < 40 * len(1000 * data)


def test_a_space_that_decoding_removes() -> None:
    """It is held until the next token shows whether it stays."""
    assert _decode_each(Decoding(cleans_spaces=True), b"a ,b ") == ["a", "", ",", "b", "", " "]
    assert _decode_each(Decoding(), b"a ") == ["a", " ", ""]


def test_sequences_have_windows_of_their_own() -> None:
    """The characters of two sequences do not mix."""
    tokens = TokenBytes(Decoding())
    first, second = tokens.new_detokenizer(after_template=True), tokens.new_detokenizer(after_template=True)
    assert [first.add(0xC3), second.add(0xC2), first.add(0xA9), second.add(0xA9)] == ["", "", "é", "©"]


def test_a_padded_vocabulary_that_is_decoded() -> None:
    """A tokenizer that fails on ids that it does not have never gets one."""
    tokens = TokenBytes(Decoding())
    detokenizer = tokens.new_detokenizer(after_template=True)
    assert [detokenizer.add(token_id) for token_id in (97, 256, 1000, 98)] == ["a", "", "", "b"]
    assert (tokens[97], tokens[256]) == (b"a", b"")
