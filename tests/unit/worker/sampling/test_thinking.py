"""Grammars of reasoning models: reasoning is unconstrained, the answer after it is constrained."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from worker.sampling.thinking import ThinkingMatcher, wrap_for_thinking

EOS, START, END_1, END_2 = 0, 40, 41, 42


class Digits:
    """A matcher that allows the tokens 1 to 9 and the end of text, and records what it receives."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.eos_words = np.array([1, 0], dtype=np.uint32)

    def fill(self, words: Any) -> None:
        words[:] = (0b11_1111_1111, 0)

    def advance(self, token_id: int) -> None:
        assert token_id < 10
        self.seen.append(token_id)


def matcher(*, is_thinking: bool, start: tuple[int, ...] = (START,)) -> tuple[ThinkingMatcher, Digits]:
    inner: Any = Digits()
    return ThinkingMatcher(inner, start, (END_1, END_2), is_thinking=is_thinking), inner


def allowed(held: ThinkingMatcher) -> set[int]:
    words = np.zeros(2, dtype=np.uint32)
    held.fill(words)
    return {i for i in range(64) if words[i // 32] >> np.uint32(i % 32) & 1}


def test_reasoning_opened_by_the_prompt() -> None:
    """Any token but end of text until all tokens of the end marker have come; then the grammar, which never received the reasoning."""
    held, inner = matcher(is_thinking=True)
    for token_id in (5, 63, END_1, 7, END_2, END_1):
        assert allowed(held) == set(range(64)) - {EOS}
        held.advance(token_id)
    held.advance(END_2)
    assert allowed(held) == set(range(10))
    held.advance(3)
    assert inner.seen == [3]


def test_reasoning_opened_by_the_model() -> None:
    """Only with its first token."""
    held, inner = matcher(is_thinking=False)
    assert allowed(held) == {*range(10), START}
    held.advance(START)
    assert allowed(held) == set(range(64)) - {EOS}
    for token_id in (END_1, END_2, 4):
        held.advance(token_id)
    assert inner.seen == [4]
    assert allowed(held) == set(range(10))
    silent, inner = matcher(is_thinking=False)
    silent.advance(4)
    assert allowed(silent) == set(range(10))
    assert inner.seen == [4]


def test_a_marker_of_several_tokens() -> None:
    """A mask covers one token: such a model cannot open reasoning under a grammar, but its prompt can."""
    held, _ = matcher(is_thinking=False, start=(START, START + 1))
    assert allowed(held) == set(range(10))


@pytest.mark.parametrize("thinks", [True, False])
def test_only_matchers_of_reasoning_models_are_wrapped(thinks: bool) -> None:
    """The matcher of any other model is returned unchanged."""
    inner: Any = Digits()
    tokenizer = SimpleNamespace(has_thinking=thinks, think_start_tokens=(START,), think_end_tokens=(END_1,))
    assert (wrap_for_thinking(inner, tokenizer, is_thinking=False) is inner) is not thinks
