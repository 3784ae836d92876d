"""Limits on JSON where length has no use: the digits of a number, and nesting depth.

A small model that is held to a grammar may write digits or brackets until it runs out of tokens. llguidance has no limit for them
that keeps exponents and never makes a schema unsatisfiable, so a `worker.sampling.grammar.GrammarMatcher` narrows its masks with a
`JSONLimiter`. Strings are not bounded, nor is the number of items: long ones may be meant. Independent of MLX and llguidance.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MAX_DIGITS = 20
"""Of an integer and of a fraction: unsigned 64-bit integers have up to 20."""
MAX_EXPONENT_DIGITS = 3
"""The exponents of 64-bit floats go up to 308."""
MAX_LEVELS = 64
"""Of nested objects and arrays; many parsers accept no more."""

Words = NDArray[np.uint32]
_DIGITS = b"0123456789"


class LimitMasks:
    """The masks of one vocabulary.

    Args:
        tokens: The bytes of each token.
        num_words: Length of a mask, in words; tokens beyond it are ignored.

    Attributes:
        by_max_digits: `by_max_digits[n]` allows tokens with at most n leading digits; no token has more than `len(by_max_digits)`.
        without_opening: Allows tokens without an opening bracket.
    """

    def __init__(self, tokens: Sequence[bytes], num_words: int) -> None:
        num_digits = [len(token) - len(token.lstrip(_DIGITS)) for token in tokens]
        counts = np.array(num_digits, np.int32)
        self.by_max_digits = [_as_words(counts <= n, num_words) for n in range(max(num_digits, default=0))]
        opening = np.array([b"[" in token or b"{" in token for token in tokens], bool)
        self.without_opening = _as_words(~opening, num_words)


class JSONLimiter:
    """Follows one answer, byte by byte, and narrows the masks of its grammar. The same bytes always lead to the same masks.

    Args:
        begins_after: The marker after which the JSON begins; empty: it begins at once.
    """

    def __init__(self, masks: LimitMasks, begins_after: bytes = b"") -> None:
        self._masks = masks
        self._begins_after = begins_after
        self._text = b""  # the end of the text before the marker
        self._is_in_string = False
        self._is_escaped = False
        self._is_exponent = False
        self._num_digits = 0
        self._level = 0

    def advance(self, data: bytes) -> None:
        """Add the bytes of a token."""
        if self._begins_after:
            before, marker, data = (self._text + data).partition(self._begins_after)
            if not marker:
                self._text = before[1 - len(self._begins_after) :]
                return
            self._begins_after = b""
        if self._is_in_string and not self._is_escaped and b'"' not in data and b"\\" not in data:
            return
        for byte in data:
            if self._is_in_string:
                self._step_in_string(byte)
            else:
                self._step(byte)

    def narrow(self, words: Words) -> None:
        """Remove the tokens that exceed a limit from a mask, unless that would leave none."""
        if self._begins_after or self._is_in_string:
            return
        num_left = (MAX_EXPONENT_DIGITS if self._is_exponent else MAX_DIGITS) - self._num_digits
        if num_left < len(self._masks.by_max_digits):
            _intersect(words, self._masks.by_max_digits[max(0, num_left)])
        if self._level >= MAX_LEVELS:
            _intersect(words, self._masks.without_opening)

    def _step_in_string(self, byte: int) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif byte == ord("\\"):
            self._is_escaped = True
        elif byte == ord('"'):
            self._is_in_string = False

    def _step(self, byte: int) -> None:
        if byte in _DIGITS:
            self._num_digits += 1
            return
        if byte in b"eE":
            self._is_exponent = self._num_digits > 0  # otherwise it is a letter of true, false or a marker
        elif byte not in b"+-":
            self._is_exponent = False
        self._num_digits = 0
        if byte == ord('"'):
            self._is_in_string = True
        elif byte in b"[{":
            self._level += 1
        elif byte in b"]}":
            self._level -= 1


def _intersect(words: Words, mask: Words) -> None:
    narrowed = words & mask
    if narrowed.any():
        words[:] = narrowed


def _as_words(bits: NDArray[np.bool_], num_words: int) -> Words:
    padded = np.ones(num_words * 32, bool)
    n = min(len(bits), len(padded))
    padded[:n] = bits[:n]
    words: Words = np.packbits(padded, bitorder="little").view(np.uint32)
    return words
