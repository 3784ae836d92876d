"""Token ids to text, one token at a time, for every kind of tokenizer that mlx-lm loads.

Owns the bytes of each token (`TokenBytes`, one per model) and the state of one sequence (`Detokenizer`). Never emits an incomplete
character: a text that ends inside one ends before it. Bytes that are invalid where they stand become U+FFFD. The same token ids always give the same text, on which a takeover relies. Independent of MLX.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import Any, Protocol

_SENTENCEPIECE_SPACE = "\u2581".encode()
_MAX_INCOMPLETE_BYTES = 3
"""Of a character in UTF-8."""

_MAX_WINDOW_TOKENS, _CONTEXT_TOKENS = 32, 8
"""How many tokens are decoded at a time, and how many of them stay as the context of the next ones."""


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
        pieces = getattr(tokenizer.detokenizer, "tokenmap", None)
        self.strips_first_space = bool(getattr(tokenizer.detokenizer, "trim_space", False))
        self.whole_texts = _WholeTexts(self)
        self._table: list[bytes] | None = None
        if pieces:
            added = {i: str(token).encode() for i, token in tokenizer.added_tokens_decoder.items()}
            to_bytes = _sentencepiece_bytes if isinstance(pieces[0], bytes) else _byte_level_bytes
            self._table = [added[i] if i in added else to_bytes(piece) for i, piece in enumerate(pieces)]
            self._num_tokens = len(self._table)
        else:
            self._num_tokens = 1 + max(tokenizer.get_vocab().values())
            probe = tokenizer.encode("a ,b", add_special_tokens=False)
            self._cleans_spaces = " ," not in tokenizer.decode(probe)

    def __getitem__(self, token_id: int) -> bytes:
        # A model's vocabulary may be padded beyond its tokenizer's.
        if token_id >= self._num_tokens:
            return b""
        return self._decode([token_id]).encode() if self._table is None else self._table[token_id]

    def new_detokenizer(self, *, after_template: bool) -> Detokenizer:
        """Create the detokenizer of one sequence.

        Args:
            after_template: Whether the text follows a chat template. A vocabulary that starts each text with a space
                (sentencepiece's dummy prefix) drops it there, and keeps it after a plain prompt.
        """
        if self._table is None:
            return _DecodingDetokenizer(self._decode, cleans_spaces=self._cleans_spaces)
        return _ByteDetokenizer(self, strip=self.strips_first_space and after_template)

    def _decode(self, token_ids: list[int]) -> str:
        """The text of those that the tokenizer has: not every tokenizer ignores others."""
        return str(
            self._tokenizer.decode([token_id for token_id in token_ids if token_id < self._num_tokens])
        )


class _WholeTexts(dict[int, "str | None"]):
    """The text of tokens that are complete characters; None for others. Filled as tokens are generated."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        super().__init__()
        self._bytes = token_bytes

    def __missing__(self, token_id: int) -> str | None:
        try:
            text = self._bytes[token_id].decode()
        except UnicodeDecodeError:
            self[token_id] = None
            return None
        self[token_id] = text
        return text


class _ByteDetokenizer:
    """For vocabularies whose tokens are bytes: byte-level BPE and SentencePiece.

    Nearly every token is made of complete characters and does not need the decoder, which costs ten times as much as the lookup.
    """

    def __init__(self, token_bytes: TokenBytes, *, strip: bool) -> None:
        self._bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._whole_texts = token_bytes.whole_texts
        self._strips = strip
        self.is_inside_character = False

    def add(self, token_id: int) -> str:
        text = None if self.is_inside_character else self._whole_texts[token_id]
        if text is None:
            text = self._decoder.decode(self._bytes[token_id])
            self.is_inside_character = bool(self._decoder.getstate()[0])
        return self._strip_first_space(text) if self._strips else text

    def flush(self) -> str:
        return ""  # only an incomplete character is ever held

    def _strip_first_space(self, text: str) -> str:
        if not text:
            return text
        self._strips = False
        return text.removeprefix(" ")


class _DecodingDetokenizer:
    """For every other vocabulary: decodes a window of the last tokens again with each token.

    Args:
        decode: Token ids to text.
        cleans_spaces: Whether `decode` removes spaces before punctuation, so that a space at the end may still go.
    """

    def __init__(self, decode: Callable[[list[int]], str], *, cleans_spaces: bool) -> None:
        self._decode = decode
        self._cleans_spaces = cleans_spaces
        self._window: list[int] = []
        self._text = ""  # of the window
        self._num_released = 0  # characters of it
        self._num_changed = 0  # tokens since it stopped to begin with the released text
        self._next_cut = _MAX_WINDOW_TOKENS

    @property
    def is_inside_character(self) -> bool:
        return False  # U+FFFD at the end may be an incomplete character, or text

    def add(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        if self._changes_released(text):
            return ""
        self._text = text
        num_held = _num_incomplete(self._text)
        if not num_held and self._cleans_spaces and self._text.endswith(" "):
            num_held = 1
        released = self._release(len(self._text) - num_held)
        if len(self._window) >= self._next_cut:
            self._shorten()
        return released

    def flush(self) -> str:
        return self._release(len(self._text) - _num_incomplete(self._text))

    def _changes_released(self, text: str) -> bool:
        """Whether a new text of the window has to wait, as it may become one that begins with the released text again.

        While the last of several adjacent characters made of byte tokens is incomplete, the Rust tokenizers (0.23, `ByteFallback`)
        decode each byte of all of them to U+FFFD.
        """
        if text.startswith(self._text[: self._num_released]) or self._num_changed == _MAX_INCOMPLETE_BYTES:
            self._num_changed = 0
            return False
        self._num_changed += 1
        return True

    def _release(self, end: int) -> str:
        released = self._text[self._num_released : end]
        self._num_released = max(self._num_released, end)
        return released

    def _shorten(self) -> None:
        """Forget all but the last tokens, unless they mean something else without those before them."""
        num_held = len(self._text) - self._num_released
        # One of four adjacent tokens begins a character, also if each is a byte.
        for num_tokens in range(_CONTEXT_TOKENS, _CONTEXT_TOKENS + _MAX_INCOMPLETE_BYTES + 1):
            window = self._window[-num_tokens:]
            text = self._decode(window)
            if self._text.endswith(text) and len(text) >= num_held:
                self._window, self._text, self._num_released = window, text, len(text) - num_held
                self._next_cut = _MAX_WINDOW_TOKENS
                return
        self._next_cut = len(self._window) + _CONTEXT_TOKENS


def _num_incomplete(text: str) -> int:
    """How many characters at the end of a decoded text may be an incomplete character: U+FFFD, one for each byte or one for all."""
    return min(_MAX_INCOMPLETE_BYTES, len(text) - len(text.rstrip("\ufffd")))


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
