"""GrammarCompiler of models that think before they answer: thoughts are free, the answer behind them is held to the grammar.

Wraps a row's matcher; fed token by token like it. Knows the marks of thinking by their token ids.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from worker.sampling.grammar import GrammarMatcher, Words

_WORD_BITS = 32


class ThinkingMatcher:
    """See the module; itself a `worker.sampling.sampler.GrammarMatcher`.

    Args:
        start_ids: What opens thinking.
        end_ids: What closes it.
        is_thinking: Whether it is open at the end of the prompt.
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
        self._latest: deque[int] = deque(maxlen=len(end_ids))

    def fill(self, words: Words) -> None:
        """As `GrammarMatcher.fill`.

        1. Thoughts may be anything, but do not end the answer.
        2. The first token of an answer may open them, where one token does.
        3. Else it is the grammar's.
        """
        if self._is_thinking:
            words[:] = ~self._matcher.eos_words
            return
        self._matcher.fill(words)
        if self._is_first and len(self._start_ids) == 1:
            place, bit = divmod(self._start_ids[0], _WORD_BITS)
            words[place] |= type(words[place])(1 << bit)

    def advance(self, token_id: int) -> None:
        """As `GrammarMatcher.advance`."""
        is_first, self._is_first = self._is_first, False
        if self._is_thinking:
            self._latest.append(token_id)
            self._is_thinking = tuple(self._latest) != self._end_ids
        elif is_first and (token_id,) == self._start_ids:
            self._is_thinking = True
        else:
            self._matcher.advance(token_id)


def wrap_for_thinking(
    matcher: GrammarMatcher, tokenizer: Any, *, is_thinking: bool
) -> GrammarMatcher | ThinkingMatcher:
    """The matcher itself for a model that does not think.

    Args:
        tokenizer: mlx-lm's `TokenizerWrapper`.
    """
    if not tokenizer.has_thinking:
        return matcher
    start_ids, end_ids = tuple(tokenizer.think_start_tokens), tuple(tokenizer.think_end_tokens)
    return ThinkingMatcher(matcher, start_ids, end_ids, is_thinking=is_thinking)
