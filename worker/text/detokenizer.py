"""Token ids to text, one token at a time, for every kind of tokenizer that mlx-lm loads.

Owns the bytes of each token (`TokenBytes`, one per model) and the state of one sequence (`Detokenizer`). Never emits an incomplete
character: a text that ends inside one ends before it. Bytes that are invalid where they stand become U+FFFD. The same token ids always give the same text, on which a takeover relies. Independent of MLX.
"""

from __future__ import annotations

import codecs
import copy
from typing import Any, Protocol

_SENTENCEPIECE_SPACE = "\u2581".encode()
_MAX_INCOMPLETE_BYTES = 3
"""Of a character in UTF-8."""


class Detokenizer(Protocol):
    """Converts the tokens of one sequence to text."""

    @property
    def is_inside_character(self) -> bool:
        """Whether the last token ended inside a character, as far as that is known."""

    def add(self, token_id: int) -> str:
        """Add a token; returns the characters that it completed, which may be none."""

    def flush(self) -> str:
        """Return the text that is held at the end, without a character that is still incomplete."""


class TokenBytes:
    """The bytes of each token of a vocabulary, by token id.

    Args:
        tokenizer: mlx-lm's `TokenizerWrapper`. mlx-lm 0.32 chooses its streaming detokenizer by the decoder section of `tokenizer.json`;
            the family of the vocabulary follows from that choice.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._streaming = tokenizer.detokenizer
        pieces = getattr(self._streaming, "tokenmap", None)
        self.strips_first_space = bool(getattr(self._streaming, "trim_space", False))
        self._table: list[bytes] | None = None
        if pieces:
            added = {i: str(token).encode() for i, token in tokenizer.added_tokens_decoder.items()}
            to_bytes = _sentencepiece_bytes if isinstance(pieces[0], bytes) else _byte_level_bytes
            self._table = [added[i] if i in added else to_bytes(piece) for i, piece in enumerate(pieces)]

    def __getitem__(self, token_id: int) -> bytes:
        if self._table is None:
            return bytes(self._tokenizer.decode([token_id]).encode())
        # A model's vocabulary may be padded beyond its tokenizer's.
        return self._table[token_id] if token_id < len(self._table) else b""

    def new_detokenizer(self, *, after_template: bool) -> Detokenizer:
        """Create the detokenizer of one sequence.

        Args:
            after_template: Whether the text follows a chat template. A vocabulary that starts each text with a space
                (sentencepiece's dummy prefix) drops it there, and keeps it after a plain prompt.
        """
        if self._table is None:
            return _DecodingDetokenizer(self._streaming)
        return _ByteDetokenizer(self, strip=self.strips_first_space and after_template)


class _ByteDetokenizer:
    """For vocabularies whose tokens are bytes: byte-level BPE and SentencePiece."""

    def __init__(self, token_bytes: TokenBytes, *, strip: bool) -> None:
        self._bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decode = self._decoder.decode
        self._strips = strip

    @property
    def is_inside_character(self) -> bool:
        return bool(self._decoder.getstate()[0])

    def add(self, token_id: int) -> str:
        return self._strip_first_space(self._decode(self._bytes[token_id]))

    def flush(self) -> str:
        return ""  # only an incomplete character is ever held

    def _strip_first_space(self, text: str) -> str:
        if not self._strips or not text:
            return text
        self._strips = False
        return text.removeprefix(" ")


class _DecodingDetokenizer:
    """For every other vocabulary: mlx-lm's detokenizer, which decodes the current line again with each token."""

    def __init__(self, streaming: Any) -> None:
        self._streaming = copy.copy(streaming)  # building one costs tens of ms; its state is reset
        self._streaming.reset()

    @property
    def is_inside_character(self) -> bool:
        return False  # mlx-lm's detokenizers do not expose it

    def add(self, token_id: int) -> str:
        self._streaming.add_token(token_id)
        return str(self._streaming.last_segment)

    def flush(self) -> str:
        self._streaming.finalize()
        held = str(self._streaming.last_segment)
        # mlx-lm holds a text that ends with U+FFFD: one per byte of an incomplete character, or one for all of them.
        num_incomplete = min(_MAX_INCOMPLETE_BYTES, len(held) - len(held.rstrip("\ufffd")))
        return held[: len(held) - num_incomplete]


def _byte_level_alphabet() -> dict[str, int]:
    """The characters that represent bytes in byte-level BPE (Radford et al. 2019, GPT-2).

    Printable Latin-1 characters represent themselves; the 68 other bytes are represented by U+0100 and up, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


def _byte_level_bytes(piece: str | None) -> bytes:
    return b"".join(bytes([_ALPHABET[char]]) if char in _ALPHABET else char.encode() for char in piece or "")


def _sentencepiece_bytes(piece: bytes) -> bytes:
    return piece.replace(_SENTENCEPIECE_SPACE, b" ")
