"""Grammars for models that reason before they answer: the reasoning is unconstrained, the answer after it matches the grammar.

Wraps a sequence's `GrammarMatcher` and is fed the same tokens; the engine creates it. Recognizes the markers of reasoning by their token ids.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

from worker.sampling.grammar import GrammarMatcher, Words

_WORD_BITS = 32


class ThinkingMatcher:
    """See the module; a `worker.sampling.sampler.Matcher`.

    Args:
        start_ids: The token ids of the marker that opens reasoning.
        end_ids: The token ids of the marker that closes it.
        is_thinking: Whether reasoning is open at the end of the prompt.
    """

    def __init__(
        self,
        matcher: GrammarMatcher,
        start_ids: tuple[int, ...],
        end_ids: tuple[int, ...],
        *,
        is_thinking: bool,
    ) -> None:
        self._matcher = matcher
        self._start_ids = start_ids
        self._end_ids = end_ids
        self._is_thinking = is_thinking
        self._is_first = True
        self._last_token_ids: deque[int] = deque(maxlen=len(end_ids))

    def fill(self, words: Words) -> None:
        """As `GrammarMatcher.fill`.

        1. Reasoning may have any token, except one that ends the answer.
        2. The first token of an answer may open reasoning, if the marker is a single token.
        3. Otherwise the grammar decides.
        """
        if self._is_thinking:
            words[:] = ~self._matcher.eos_words
            return
        self._matcher.fill(words)
        if self._is_first and len(self._start_ids) == 1:
            index, bit = divmod(self._start_ids[0], _WORD_BITS)
            words[index] |= np.uint32(1 << bit)

    def advance(self, token_id: int) -> None:
        """As `GrammarMatcher.advance`."""
        is_first, self._is_first = self._is_first, False
        if self._is_thinking:
            self._last_token_ids.append(token_id)
            self._is_thinking = tuple(self._last_token_ids) != self._end_ids
        elif is_first and (token_id,) == self._start_ids:
            self._is_thinking = True
        else:
            self._matcher.advance(token_id)


def wrap_for_thinking(
    matcher: GrammarMatcher, tokenizer: Any, *, is_thinking: bool
) -> GrammarMatcher | ThinkingMatcher:
    """Wrap the matcher of a model that reasons; the matcher of any other model is returned as it is.

    Args:
        tokenizer: mlx-lm's `TokenizerWrapper`.
        is_thinking: Whether reasoning is open at the end of the prompt.
    """
    if not tokenizer.has_thinking:
        return matcher
    start_ids, end_ids = tuple(tokenizer.think_start_tokens), tuple(tokenizer.think_end_tokens)
    return ThinkingMatcher(matcher, start_ids, end_ids, is_thinking=is_thinking)
