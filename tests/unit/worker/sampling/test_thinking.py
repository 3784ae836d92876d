"""Grammars of reasoning models: reasoning is unconstrained, the answer after it is constrained."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from common.protocol import ChatPrompt, GenerationJob
from worker.sampling.thinking import ReasoningMeter, ThinkingBudget, ThinkingMatcher, wrap_for_thinking
from worker.text.answer_format import NORMAL, REASONING, ModelFormat
from worker.text.answer_parser import AnswerParser

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


def allowed(held: ThinkingMatcher | ThinkingBudget) -> set[int]:
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


OPEN, CLOSE = "<think>", "</think>"
TEXTS = {0: "", 1: "a ", 2: "b ", 3: OPEN, 4: CLOSE, 5: "<call>", 6: "</", 7: "think", 8: ">"}
THINKING = ModelFormat({NORMAL: [(OPEN, REASONING)], REASONING: [(CLOSE, NORMAL)]})


class Words:
    """A detokenizer of the texts above."""

    is_inside_character = False

    def add(self, token_id: int) -> str:
        return TEXTS[token_id]

    def flush(self) -> str:
        return ""


def budget(
    max_tokens: int, *, opened: bool = False, end: tuple[int, ...] = (4,), inner: Any = None
) -> ThinkingBudget:
    prompt = ChatPrompt([{"role": "user", "content": "hi"}])
    job = GenerationJob(job_id="a", model="m", channel="c", prompt=prompt)
    parser = AnswerParser(job, THINKING, REASONING if opened else NORMAL)
    return ThinkingBudget(ReasoningMeter(parser, Words(), {0}), max_tokens, end, inner)


def forced(held: ThinkingBudget) -> int | None:
    """The only token that may come next; None: any."""
    tokens = allowed(held)
    assert held.is_open == (len(tokens) == 64)
    return None if held.is_open else tokens.pop()


def followed(held: ThinkingBudget, *token_ids: int) -> list[int | None]:
    """What was forced before each token, and after the last."""
    states = [forced(held)]
    for token_id in token_ids:
        held.advance(token_id)
        states.append(forced(held))
    return states


def test_a_budget_of_reasoning_that_the_prompt_opened() -> None:
    """After so many tokens the marker is forced, once; the answer is free."""
    assert followed(budget(2, opened=True), 1, 2, 4, 1, 2, 1, 1) == [None, None, 4, *[None] * 5]


def test_a_budget_of_reasoning_that_the_model_opens() -> None:
    """The marker that opens it counts, as in the usage; text before it does not."""
    assert followed(budget(2), 1, 1, 1, 3, 1, 4) == [None, None, None, None, None, 4, None]


def test_a_budget_of_zero() -> None:
    """Reasoning ends where it begins."""
    assert followed(budget(0, opened=True), 4, 1) == [4, None, None]
    assert followed(budget(0), 3, 4, 1) == [None, 4, None, None]


def test_reasoning_that_ends_by_itself() -> None:
    """Nothing is forced, unless a later block uses up what is left; one after that ends at once."""
    assert followed(budget(4, opened=True), 1, 4, 2, 3, 1, 4, 3, 4) == [*[None] * 5, 4, None, 4, None]


def test_a_marker_of_several_tokens_is_forced_in_order() -> None:
    """Also when the model has written a part of it by chance."""
    assert followed(budget(1, opened=True, end=(6, 7, 8)), 1, 6, 7, 8, 1) == [None, 6, 7, 8, None, None]


def test_the_budget_is_a_function_of_the_tokens() -> None:
    """After a takeover, tokens of a worker without the limit included, the same is forced."""
    tokens = [1, 2, 1, 1, 4, 3, 1]
    at_once = budget(2, opened=True)
    states = followed(at_once, *tokens)
    assert states == [None, None, 4, 4, 4, None, 4, 4]
    for k in range(len(tokens)):
        replayed = budget(2, opened=True)
        for token_id in tokens[:k]:
            replayed.advance(token_id)
        assert forced(replayed) == states[k]


def test_a_budget_waits_for_the_end_of_a_character() -> None:
    """The marker never follows half a character."""
    held = budget(1, opened=True)
    words: Any = held._meter._detokenizer
    words.is_inside_character = True
    assert followed(held, 1) == [None, None]
    words.is_inside_character = False
    assert followed(held, 1)[-1] == 4


def test_a_budget_and_a_grammar() -> None:
    """Both apply; the grammar decides if it does not allow the marker."""
    inner: Any = ThinkingMatcher(Digits(), (START,), (4,), is_thinking=True)  # type: ignore[arg-type]
    held = budget(1, opened=True, inner=inner)
    assert allowed(held) == set(range(64)) - {EOS}
    held.advance(1)
    assert allowed(held) == {4}
    held.advance(4)
    assert allowed(held) == set(range(10))
    assert not held.is_open
    refusing: Any = SimpleNamespace(
        fill=lambda words: words.__setitem__(slice(None), 2), advance=lambda _: None, is_open=False
    )
    assert allowed(budget(0, opened=True, inner=refusing)) == {1, 33}
