"""What may come next in a row whose answer has to match a grammar, by llguidance.

`GrammarCompiler` is made once a model; the intake thread compiles with it (`Engine.encode`), the generation thread makes a
`GrammarMatcher` a row, asks it for a mask before each draw, and tells it what was drawn. A mask is bits: bit i % 32 of word i // 32
is token i. The same tokens always lead to the same state, which is what a takeover relies on. Knows nothing of MLX.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from common.digest_cache import DigestCache
from common.errors import MLXPoolError, invalid
from common.schema import grammar as texts
from worker.text.detokenizer import TokenBytes

if TYPE_CHECKING:
    from llguidance import LLMatcher

Words = NDArray[np.uint32]

_WORD_BITS = 32
_MAX_COMPILED = 32
"""CompiledGrammar grammars: a few hundred kilobytes each, seldom some megabytes."""

_TEXT_MARKS = (texts.CALL_BEGIN, texts.CALL_END)
"""Tokens that stand for their own text in a grammar, also where a tokenizer calls them special."""


class GrammarError(MLXPoolError):
    """This row cannot go on: its grammar does not allow the token, or is too much for llguidance's limits."""


class CompiledGrammar:
    """A grammar, ready for any number of rows.

    Attributes:
        start: In the state before the first token; only ever copied.
        grammars: What it was compiled by.
    """

    __slots__ = ("grammars", "start")

    def __init__(self, start: LLMatcher, grammars: GrammarCompiler) -> None:
        self.start = start
        self.grammars = grammars


class GrammarCompiler:
    """Compiles grammars for one model's vocabulary.

    Args:
        tokenizer: mlx-lm's `TokenizerWrapper`.
        vocab_size: How many logits the model has; its tokenizer may know fewer tokens, or more.
        eos_token_ids: Each of them may come exactly where the grammar can end.

    Attributes:
        num_words: Of a mask.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        from llguidance import LLTokenizer, TokenizerWrapper

        self.vocab_size = vocab_size
        self.num_words = num_words(vocab_size)
        self.eos_token_ids = frozenset(eos_token_ids)
        eos = sorted(self.eos_token_ids)
        self._tokenizer = LLTokenizer(
            TokenizerWrapper(_Vocabulary(tokenizer, vocab_size, eos)), eos_token=eos
        )
        self.num_ll_words = num_words(int(self._tokenizer.vocab_size))
        self.eos_words: Words = np.zeros(self.num_words, np.uint32)
        for token_id in self.eos_token_ids:
            if token_id < vocab_size:
                self.eos_words[token_id // _WORD_BITS] |= np.uint32(1 << token_id % _WORD_BITS)
        self._compiled: DigestCache[CompiledGrammar] = DigestCache(_MAX_COMPILED)

    def compile(self, grammar: str, param: str = "response_format") -> CompiledGrammar:
        """Compile a grammar: milliseconds, without the interpreter's lock, and from the cache the second time. Any thread may call.

        Args:
            param: What a client has asked for it with.

        Raises:
            RequestError: 400; it cannot be compiled, or nothing can match it.
        """
        return self._compiled.get(grammar, lambda: self._compile(grammar, param))

    def _compile(self, grammar: str, param: str) -> CompiledGrammar:
        from llguidance import LLMatcher

        compiled = CompiledGrammar(
            LLMatcher(self._tokenizer, grammar, log_level=0, limits=texts.limits()), self
        )
        if not compiled.start.is_error():
            try:
                # On a copy: the first mask is part of what is checked.
                GrammarMatcher(compiled).allowed()
            except GrammarError as error:
                raise invalid(f"The grammar cannot be used with this model: {error}", param) from None
            return compiled
        raise invalid(
            f"The grammar cannot be used with this model: {texts.line(compiled.start.get_error())}",
            param,
        )


class GrammarMatcher:
    """Where one row stands in its grammar. One thread's."""

    def __init__(self, compiled: CompiledGrammar) -> None:
        self._grammars = compiled.grammars
        self._matcher = compiled.start.deep_copy()
        self._is_ended = False
        self._scratch: Words = np.empty(self._grammars.num_ll_words, np.uint32)

    @property
    def eos_words(self) -> Words:
        """The mask of the tokens that end an answer."""
        return self._grammars.eos_words

    @property
    def is_finished(self) -> bool:
        """Whether only an end-of-text token may come."""
        return self._is_ended or self._matcher.is_stopped()

    def allowed(self) -> Words:
        """A new mask of what may come next, shape (num_words,)."""
        words: Words = np.empty(self._grammars.num_words, np.uint32)
        self.fill(words)
        return words

    def fill(self, out: Words) -> None:
        """Write the mask of what may come next into `out`, such as a row of a (batch, num_words) array.

        Raises:
            GrammarError: Nothing may, or a limit was reached.
        """
        if self.is_finished:
            out[:] = self._grammars.eos_words
            return
        self._matcher.unsafe_compute_mask_ptr(self._scratch.ctypes.data, self._scratch.nbytes)
        if self._matcher.is_error():
            raise GrammarError(texts.line(self._matcher.get_error()))
        n = min(len(out), len(self._scratch))
        out[:n] = self._scratch[:n]
        out[n:] = 0
        # llguidance allows one of them, and that only where it has no other way (1.9.1).
        if self._matcher.is_accepting():
            out |= self._grammars.eos_words
        if not out.any():
            raise GrammarError("The grammar allows no token of this model's vocabulary.")

    def advance(self, token_id: int) -> None:
        """Go on with a token.

        Raises:
            GrammarError: The grammar does not allow it.
        """
        if token_id in self._grammars.eos_token_ids:
            if not (self.is_finished or self._matcher.is_accepting()):
                raise GrammarError("The answer ends before its grammar does.")
            self._is_ended = True
        elif self.is_finished or not self._matcher.consume_token(token_id):
            raise GrammarError(f"The grammar does not allow token {token_id}.")

    def replay(self, token_ids: Sequence[int]) -> None:
        """Go on with tokens that were drawn before, here or in another process.

        Raises:
            GrammarError: The grammar does not allow one of them.
        """
        for token_id in token_ids:
            self.advance(token_id)


def num_words(vocab_size: int) -> int:
    return -(-vocab_size // _WORD_BITS)


def unpacked(words: Words, vocab_size: int) -> NDArray[np.bool_]:
    """Masks as booleans: (batch, num_words) to (batch, vocab_size)."""
    bits = np.unpackbits(
        words.astype("<u4", copy=False).view(np.uint8), axis=-1, count=vocab_size, bitorder="little"
    )
    return bits.view(np.bool_)


def apply(words: Words, logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """`logits` (batch, vocab) with minus infinity where `words` (batch, num_words) has no bit."""
    return np.where(unpacked(words, logits.shape[-1]), logits, np.float32(-np.inf))


def apply_mlx(mx: Any, words: Any, logits: Any) -> Any:
    """The same on MLX's arrays, which `mx` is to compute with: `words` (batch, num_words) uint32."""
    bits = (words[:, :, None] >> mx.arange(_WORD_BITS, dtype=mx.uint32)) & 1
    mask = bits.reshape(words.shape[0], -1)[:, : logits.shape[-1]]
    return mx.where(mask.astype(mx.bool_), logits, -mx.inf)


class _Vocabulary:
    """A tokenizer as `llguidance.TokenizerWrapper` wants it: what each token stands for, and how text becomes tokens.

    llguidance's own way, from `tokenizer.json`, takes every added token for a special one, ``<tool_call>`` and runs of white
    space too: its masks then allow what its parser refuses (1.9.1).
    """

    bos_token_id = None

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: list[int]) -> None:
        token_bytes = TokenBytes(tokenizer)
        num_known = max(tokenizer.get_vocab().values()) + 1
        added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
        special = {i for i, token in added.items() if getattr(token, "special", True)}
        special |= {*getattr(tokenizer, "all_special_ids", [])}
        special = {i for i in special if token_bytes[i].decode(errors="replace") not in _TEXT_MARKS}
        self.special_token_ids = sorted(special.union(eos_token_ids))
        self.eos_token_id = eos_token_ids[0]
        self.tokens = [token_bytes[i] if i < num_known else b"" for i in range(max(vocab_size, num_known))]
        self._by_bytes = {data: i for i, data in enumerate(self.tokens) if data and i not in special}
        self._longest = max(map(len, self._by_bytes))
        backend = getattr(getattr(tokenizer, "_tokenizer", tokenizer), "backend_tokenizer", None)
        self._encode = None if backend is None else _plain(backend)

    def __call__(self, text: bytes) -> list[int]:
        """As the model learnt to read it; for text that a grammar leaves no choice about."""
        if self._encode is not None:
            token_ids: list[int] = self._encode(text.decode(errors="replace")).ids
            if b"".join(self.tokens[i] for i in token_ids) == text:
                return token_ids
        return self._greedy(text)

    def _greedy(self, text: bytes) -> list[int]:
        token_ids, start = [], 0
        while start < len(text):
            ends = range(min(len(text), start + self._longest), start, -1)
            end = next((end for end in ends if text[start:end] in self._by_bytes), None)
            if end is None:
                break  # llguidance goes on without a choice of ours
            token_ids.append(self._by_bytes[text[start:end]])
            start = end
        return token_ids


def _plain(backend: Any) -> Any:
    """A fast tokenizer's `encode` for text in the midst of other text: nothing special, no space in front, nothing cut."""
    from tokenizers import Tokenizer

    whole = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    for added in whole.get("added_tokens", []):
        if added["content"] in _TEXT_MARKS:
            added["special"] = False
    normalizer = whole.get("normalizer") or {}
    parts = [
        part
        for part in normalizer.get("normalizers", [normalizer])
        if part.get("type") not in (None, "Prepend")
    ]
    whole["normalizer"] = {"type": "Sequence", "normalizers": parts} if parts else None
    splitter = whole.get("pre_tokenizer") or {}
    for part in splitter.get("pretokenizers", [splitter]):
        if part.get("type") == "Metaspace":
            part["prepend_scheme"] = "never"
    plain = Tokenizer.from_str(json.dumps(whole))
    plain.encode_special_tokens = True
    return functools.partial(plain.encode, add_special_tokens=False)
