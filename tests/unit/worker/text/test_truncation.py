"""The oldest messages of a conversation that is too long are dropped."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import RequestError, invalid
from common.protocol import ChatPrompt, GenerationJob
from worker.text import truncation
from worker.text.prompts import tokenize
from worker.text.truncation import suffixes, tokenize_newest

SYSTEM = {"role": "system", "content": "s"}


def message(role: str, length: int = 1) -> dict[str, Any]:
    return {"role": role, "content": "x" * length}


def job(
    messages: list[dict[str, Any]], max_tokens: int | None = 1, truncate_to: int | None = None
) -> GenerationJob:
    prompt = ChatPrompt(messages, truncate_to=truncate_to)
    return GenerationJob(job_id="a", model="m", channel="c", prompt=prompt, max_tokens=max_tokens)


def characters(each: GenerationJob, max_tokens: int) -> list[int]:
    """A token for each character."""
    assert isinstance(each.prompt, ChatPrompt)
    ids = [ord(c) for m in each.prompt.messages for c in m["content"]]
    if len(ids) >= max_tokens:
        raise invalid("too long", "messages", truncation.TOO_LONG)
    return ids


def test_system_messages_stay_and_results_do_not_lead() -> None:
    """Wherever system messages stand; the result of a call that is gone is gone too."""
    late = {"role": "system", "content": "late"}
    messages = [
        SYSTEM,
        message("user"),
        message("assistant"),
        message("tool"),
        late,
        message("user"),
        message("assistant"),
    ]
    assert suffixes(messages) == [
        [SYSTEM, *messages[2:]],
        [SYSTEM, late, *messages[5:]],
        [SYSTEM, late, messages[6]],
    ]
    assert suffixes([SYSTEM, message("user")]) == []


def test_a_prompt_that_fits_is_complete() -> None:
    """Even if it leaves room for one token only."""
    messages = [SYSTEM, message("user", 5), message("assistant", 3)]
    assert len(tokenize_newest(job(messages, max_tokens=8), 10, characters)) == 9


@given(st.lists(st.integers(1, 9), min_size=2, max_size=30), st.integers(20, 60), st.integers(1, 10))
def test_as_few_messages_as_possible_are_dropped(
    lengths: list[int], max_tokens: int, answer_tokens: int
) -> None:
    """What is left has room for the answer, and one message more would not; the last message stays in any case."""
    messages = [SYSTEM, *(message("user", length) for length in lengths)]
    found = tokenize_newest(job(messages, answer_tokens), max_tokens, characters)
    total = 1 + sum(lengths)
    if total < max_tokens:
        assert len(found) == total
        return
    room = max_tokens - min(answer_tokens, max_tokens // 2)
    kept = next((i for i in range(1, len(lengths)) if 1 + sum(lengths[i:]) < room), len(lengths) - 1)
    assert len(found) == 1 + sum(lengths[kept:])


def test_a_last_message_that_is_too_long() -> None:
    """There is nothing to drop that would help: the error is that of a prompt that is not truncated."""
    for messages in ([message("user", 50)], [message("user"), message("user", 50)]):
        with pytest.raises(RequestError) as error:
            tokenize_newest(job(messages), 20, characters)
        assert error.value.code == truncation.TOO_LONG


def test_other_errors_are_not_hidden() -> None:
    """A template that refuses the messages."""

    def refuse(_job: GenerationJob, _max_tokens: int) -> list[int]:
        raise invalid("The template refuses these messages.", "messages")

    with pytest.raises(RequestError) as error:
        tokenize_newest(job([message("user"), message("user")]), 20, refuse)
    assert error.value.code is None


class Tokenizer:
    """One token per character."""

    has_chat_template = False

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]


def test_only_on_request() -> None:
    """Without `truncate_to` a prompt that is too long is refused; a worker with a shorter context uses its own."""
    messages = [message("user", 60), message("user", 10)]
    with pytest.raises(RequestError):
        tokenize(job(messages), Tokenizer(), 60)
    assert len(tokenize(job(messages, truncate_to=60), Tokenizer(), 60)) < 60
    assert len(tokenize(job(messages, truncate_to=100), Tokenizer(), 60)) < 60
