"""Matchers for models that reason before they answer: a grammar that applies only to the answer, and a limit on reasoning tokens.

Both wrap a sequence's matcher and are fed the same tokens; the engine creates them. `ThinkingMatcher` recognizes the markers of
reasoning by their token ids; `ThinkingBudget` by text, as the answer's parser does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from worker.sampling.grammar import GrammarMatcher, Words
from worker.sampling.sequence_sampler import Matcher
from worker.text.answer_parser import AnswerParser
from worker.text.detokenizer import Detokenizer

_WORD_BITS = 32


class ThinkingMatcher:
    """See the module; a `worker.sampling.sequence_sampler.Matcher`.

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

    is_open = False
    """See `worker.sampling.sequence_sampler.Matcher`."""

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


class ReasoningMeter:
    """Counts the reasoning tokens of an answer, as `worker.loop.sequence` does for the usage.

    Attributes:
        num_tokens: Reasoning tokens so far, markers included.

    Args:
        parser: In its initial state; not shared.
        detokenizer: The same.
        eos_token_ids: Tokens without text.
    """

    def __init__(
        self, parser: AnswerParser, detokenizer: Detokenizer, eos_token_ids: Collection[int] = ()
    ) -> None:
        self._parser = parser
        self._detokenizer = detokenizer
        self._eos_token_ids = eos_token_ids
        self.num_tokens = 0

    def add(self, token_id: int) -> None:
        """Append a token of the answer."""
        text = "" if token_id in self._eos_token_ids else self._detokenizer.add(token_id)
        self.num_tokens += self._parser.feed_token(text)[1]

    @property
    def is_reasoning(self) -> bool:
        """Whether the next token is reasoning."""
        return self._parser.is_reasoning

    @property
    def is_inside_character(self) -> bool:
        """Whether the answer so far ends inside a character."""
        return self._detokenizer.is_inside_character


class ThinkingBudget:
    """Ends reasoning after a number of tokens by forcing the closing marker, token by token; a `worker.sampling.sequence_sampler.Matcher`.

    The budget is shared by all reasoning blocks of an answer; a block that opens when it is used up is closed at once. If the inner
    grammar does not allow the marker, the grammar wins.

    Args:
        end_ids: The token ids of the marker that closes reasoning, at least one.
        inner: The grammar; None: there is none.
    """

    def __init__(
        self, meter: ReasoningMeter, max_tokens: int, end_ids: Sequence[int], inner: Matcher | None
    ) -> None:
        self._meter = meter
        self._max_tokens = max_tokens
        self._end_ids = tuple(end_ids)
        self._inner = inner
        self._forced: deque[int] = deque()
        self._force_if_used_up()

    @property
    def is_open(self) -> bool:
        """See `worker.sampling.sequence_sampler.Matcher`."""
        return self._inner is None and not self._forced

    def fill(self, words: Words) -> None:
        """As `GrammarMatcher.fill`."""
        if self._inner is None:
            words[:] = 0xFFFFFFFF
        else:
            self._inner.fill(words)
        if not self._forced:
            return
        index, bit = divmod(self._forced[0], _WORD_BITS)
        if index < len(words) and words[index] >> np.uint32(bit) & 1:
            words[:] = 0
            words[index] = np.uint32(1 << bit)

    def advance(self, token_id: int) -> None:
        """As `GrammarMatcher.advance`."""
        self._meter.add(token_id)
        if self._inner is not None:
            self._inner.advance(token_id)
        if self._forced and self._forced.popleft() != token_id:
            self._forced.clear()
        if not self._forced:
            self._force_if_used_up()

    def _force_if_used_up(self) -> None:
        meter = self._meter
        if meter.is_reasoning and meter.num_tokens >= self._max_tokens and not meter.is_inside_character:
            self._forced.extend(self._end_ids)
