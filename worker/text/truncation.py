"""Drops the oldest messages of a conversation that is too long, for requests that ask for that (`truncation: auto` in OpenAI's
responses).

System messages are never dropped. The rest begins with a turn, not with the result of a call that was dropped. Used by `worker.text.prompts`. Independent of tokenizers and templates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from common.errors import RequestError
from common.protocol import ChatPrompt, GenerationJob

TOO_LONG = "context_length_exceeded"

_ANSWER_FRACTION = 8
"""An answer without a limit of its own is left 1/8 of the context."""

Messages = list[dict[str, Any]]


def tokenize_newest(
    job: GenerationJob, max_tokens: int, tokenize: Callable[[GenerationJob, int], list[int]]
) -> list[int]:
    """The tokens of a job's prompt, without its oldest messages if it is too long.

    Args:
        job: Of a chat.
        max_tokens: A prompt with this many tokens is too long. The same for every worker, so that one that takes the job over
            drops the same messages.
        tokenize: Returns the tokens of a job's prompt; raises if there are as many as the given number or more.

    Raises:
        RequestError: 400; even the last messages are too long, or as `tokenize` raises.
    """
    try:
        return tokenize(job, max_tokens)
    except RequestError as error:
        if error.code != TOO_LONG:
            raise
    answer_tokens = min(job.max_tokens or max_tokens // _ANSWER_FRACTION, max_tokens // 2)
    prompt = job.prompt
    assert isinstance(prompt, ChatPrompt)
    shorter = suffixes(prompt.messages)
    fitting: list[int] | None = None
    first, last = 0, len(shorter) - 1
    while first < last:
        middle = (first + last) // 2
        fitting_now = _fitting(job, prompt, shorter[middle], max_tokens - answer_tokens, tokenize)
        if fitting_now is None:
            first = middle + 1
        else:
            fitting, last = fitting_now, middle
    if fitting is not None:
        return fitting
    kept = msgspec.structs.replace(prompt, messages=shorter[last] if shorter else prompt.messages)
    return tokenize(msgspec.structs.replace(job, prompt=kept), max_tokens)


def _fitting(
    job: GenerationJob,
    prompt: ChatPrompt,
    messages: Messages,
    max_tokens: int,
    tokenize: Callable[[GenerationJob, int], list[int]],
) -> list[int] | None:
    """The prompt's tokens with only these messages; None: too many."""
    shorter = msgspec.structs.replace(job, prompt=msgspec.structs.replace(prompt, messages=messages))
    try:
        return tokenize(shorter, max_tokens)
    except RequestError as error:
        if error.code != TOO_LONG:
            raise
        return None


def suffixes(messages: Messages) -> list[Messages]:
    """The conversation with ever more of its oldest messages dropped, at least one; the last one has a single turn."""
    starts = [i for i, message in enumerate(messages) if message["role"] not in ("system", "tool")]
    return [
        [message for message in messages[:start] if message["role"] == "system"] + messages[start:]
        for start in starts[1:]
    ]
