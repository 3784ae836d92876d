"""Constrains answers to a grammar, with llguidance: which tokens may come next in a sequence.

There is one `GrammarCompiler` per model. The intake thread compiles with it (`Engine.encode`); the generation thread creates a
`GrammarMatcher` per sequence, asks it for a mask before each draw and advances it by each token. A mask is an array of uint32 words: bit
i % 32 of word i // 32 is token id i. The same tokens always lead to the same state, on which a takeover relies. Independent of MLX.
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
from worker.sampling.json_limits import JSONLimiter, LimitMasks
from worker.text.detokenizer import TokenBytes

if TYPE_CHECKING:
    from llguidance import LLMatcher

Words = NDArray[np.uint32]

_WORD_BITS = 32
_MAX_COMPILED = 32
"""How many compiled grammars are cached; a few hundred kilobytes each, seldom some megabytes."""

_TEXT_MARKERS = (texts.CALL_BEGIN, texts.CALL_END)
"""Tokens that represent their own text in a grammar, even if a tokenizer marks them as special."""


class GrammarError(MLXPoolError):
    """The sequence cannot continue: its grammar allows no token or not this one, or exceeds llguidance's limits."""


class CompiledGrammar:
    """A grammar, ready for any number of sequences.

    Attributes:
        initial: llguidance's matcher in the state before the first token; only ever copied.
        compiler: What compiled it.
        json_begins_after: The marker behind which JSON begins; empty: at once.
    """

    __slots__ = ("compiler", "initial", "json_begins_after")

    def __init__(self, initial: LLMatcher, compiler: GrammarCompiler, json_begins_after: bytes) -> None:
        self.initial = initial
        self.compiler = compiler
        self.json_begins_after = json_begins_after


class GrammarCompiler:
    """Compiles grammars for one model's vocabulary.

    Args:
        tokenizer: mlx-lm's `TokenizerWrapper`.
        vocab_size: The model's number of logits; the tokenizer may have fewer tokens, or more.
        eos_token_ids: Not empty; each may come exactly where the grammar can end.

    Attributes:
        num_words: Length of a mask, in words.
        num_ll_words: Length of llguidance's own masks, in words; may differ.
        eos_words: The mask of the end-of-text tokens, (num_words,).
        tokens: The bytes of each token.
        limit_masks: What bounds numbers and nesting.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        from llguidance import LLTokenizer, TokenizerWrapper

        self.vocab_size = vocab_size
        self.num_words = num_words(vocab_size)
        self.eos_token_ids = frozenset(eos_token_ids)
        eos = sorted(self.eos_token_ids)
        vocabulary = _Vocabulary(tokenizer, vocab_size, eos)
        self._tokenizer = LLTokenizer(TokenizerWrapper(vocabulary), eos_token=eos)
        self.tokens = vocabulary.tokens
        self.limit_masks = LimitMasks(self.tokens, self.num_words)
        self.num_ll_words = num_words(int(self._tokenizer.vocab_size))
        self.eos_words: Words = np.zeros(self.num_words, np.uint32)
        for token_id in self.eos_token_ids:
            if token_id < vocab_size:
                self.eos_words[token_id // _WORD_BITS] |= np.uint32(1 << token_id % _WORD_BITS)
        self._compiled: DigestCache[CompiledGrammar] = DigestCache(_MAX_COMPILED)

    def compile(self, grammar: str, param: str = "response_format") -> CompiledGrammar:
        """Compile a grammar, or return it from the cache. Takes milliseconds, without the GIL; may be called on any thread.

        Args:
            param: The request parameter that an error refers to.

        Raises:
            RequestError: 400; the grammar cannot be compiled, or nothing can match it.
        """
        return self._compiled.get(grammar, lambda: self._compile(grammar, param))

    def _compile(self, grammar: str, param: str) -> CompiledGrammar:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=texts.limits())
        compiled = CompiledGrammar(matcher, self, texts.json_begins_after(grammar).encode())
        if not compiled.initial.is_error():
            try:
                # The first mask is part of the check. It is computed on a copy.
                GrammarMatcher(compiled).allowed()
            except GrammarError as error:
                raise invalid(f"The grammar cannot be used with this model: {error}", param) from None
            return compiled
        raise invalid(
            f"The grammar cannot be used with this model: {texts.line(compiled.initial.get_error())}",
            param,
        )


class GrammarMatcher:
    """The state of one sequence in its grammar. Used on one thread."""

    def __init__(self, compiled: CompiledGrammar) -> None:
        self._compiler = compiled.compiler
        self._matcher = compiled.initial.deep_copy()
        self._limiter = JSONLimiter(compiled.compiler.limit_masks, compiled.json_begins_after)
        self._is_ended = False
        self._scratch: Words = np.empty(self._compiler.num_ll_words, np.uint32)

    is_open = False
    """See `worker.sampling.sequence_sampler.Matcher`."""

    @property
    def eos_words(self) -> Words:
        """The mask of the end-of-text tokens, (num_words,)."""
        return self._compiler.eos_words

    @property
    def is_finished(self) -> bool:
        """Whether only an end-of-text token is allowed."""
        return self._is_ended or self._matcher.is_stopped()

    def allowed(self) -> Words:
        """The mask of the tokens that may come next, as a new array (num_words,)."""
        words: Words = np.empty(self._compiler.num_words, np.uint32)
        self.fill(words)
        return words

    def fill(self, out: Words) -> None:
        """Write the mask of the tokens that may come next into `out`, such as a row of a (batch, num_words) array.

        Raises:
            GrammarError: No token is allowed, or one of llguidance's limits was reached.
        """
        if self.is_finished:
            out[:] = self._compiler.eos_words
            return
        self._matcher.unsafe_compute_mask_ptr(self._scratch.ctypes.data, self._scratch.nbytes)
        if self._matcher.is_error():
            raise GrammarError(texts.line(self._matcher.get_error()))
        n = min(len(out), len(self._scratch))
        out[:n] = self._scratch[:n]
        out[n:] = 0
        # llguidance 1.9.1 allows one end-of-text token, and only if no other token is allowed.
        if self._matcher.is_accepting():
            out |= self._compiler.eos_words
        if not out.any():
            raise GrammarError("The grammar allows no token of this model's vocabulary.")
        self._limiter.narrow(out)

    def advance(self, token_id: int) -> None:
        """Append a token.

        Raises:
            GrammarError: The grammar does not allow it.
        """
        if token_id in self._compiler.eos_token_ids:
            if not (self.is_finished or self._matcher.is_accepting()):
                raise GrammarError("The answer ends before its grammar does.")
            self._is_ended = True
        elif self.is_finished or not self._matcher.consume_token(token_id):
            raise GrammarError(f"The grammar does not allow token {token_id}.")
        else:
            self._limiter.advance(self._compiler.tokens[token_id])


def num_words(vocab_size: int) -> int:
    """The number of uint32 words in a mask."""
    return -(-vocab_size // _WORD_BITS)


class _Vocabulary:
    """A tokenizer in the form that `llguidance.TokenizerWrapper` expects: the bytes of each token, and a function that tokenizes text.

    llguidance's own conversion of `tokenizer.json` treats every added token as special, ``<tool_call>`` and runs of white space
    included; its masks then allow tokens that its parser refuses (1.9.1).
    """

    bos_token_id = None

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: list[int]) -> None:
        token_bytes = TokenBytes(tokenizer)
        num_known = max(tokenizer.get_vocab().values()) + 1
        added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
        special = {i for i, token in added.items() if getattr(token, "special", True)}
        special |= {*getattr(tokenizer, "all_special_ids", [])}
        special = {i for i in special if token_bytes[i].decode(errors="replace") not in _TEXT_MARKERS}
        self.special_token_ids = sorted(special.union(eos_token_ids))
        self.eos_token_id = eos_token_ids[0]
        self.tokens = [token_bytes[i] if i < num_known else b"" for i in range(max(vocab_size, num_known))]
        self._by_bytes = {data: i for i, data in enumerate(self.tokens) if data and i not in special}
        self._max_token_bytes = max(map(len, self._by_bytes))
        backend = getattr(getattr(tokenizer, "_tokenizer", tokenizer), "backend_tokenizer", None)
        self._encode = None if backend is None else _plain_encoder(backend)

    def __call__(self, text: bytes) -> list[int]:
        """Tokenize text that the grammar forces, as in the model's training data."""
        if self._encode is not None:
            token_ids: list[int] = self._encode(text.decode(errors="replace")).ids
            if b"".join(self.tokens[i] for i in token_ids) == text:
                return token_ids
        return self._greedy(text)

    def _greedy(self, text: bytes) -> list[int]:
        token_ids, start = [], 0
        while start < len(text):
            ends = range(min(len(text), start + self._max_token_bytes), start, -1)
            end = next((end for end in ends if text[start:end] in self._by_bytes), None)
            if end is None:
                break  # llguidance continues without a forced token
            token_ids.append(self._by_bytes[text[start:end]])
            start = end
        return token_ids


def _plain_encoder(backend: Any) -> Any:
    """A fast tokenizer's `encode` for a fragment of a text: no special tokens, no space prepended, no truncation."""
    from tokenizers import Tokenizer

    config = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    for added in config.get("added_tokens", []):
        if added["content"] in _TEXT_MARKERS:
            added["special"] = False
    normalizer = config.get("normalizer") or {}
    parts = [
        part
        for part in normalizer.get("normalizers", [normalizer])
        if part.get("type") not in (None, "Prepend")
    ]
    config["normalizer"] = {"type": "Sequence", "normalizers": parts} if parts else None
    splitter = config.get("pre_tokenizer") or {}
    for part in splitter.get("pretokenizers", [splitter]):
        if part.get("type") == "Metaspace":
            part["prepend_scheme"] = "never"
    plain = Tokenizer.from_str(json.dumps(config))
    plain.encode_special_tokens = True
    return functools.partial(plain.encode, add_special_tokens=False)
