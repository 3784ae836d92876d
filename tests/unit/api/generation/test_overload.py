"""The estimated tokens of a request in the queue, and the error if the queue is full."""

from __future__ import annotations

import pytest

from api.generation.overload import estimated_tokens, refusal
from api.generation.request import GenerationRequest
from api.generation.served_model import ServedModel
from common import names
from common.protocol import SamplingParams, TextPrompt, TokenPrompt


def served(**fields: float) -> ServedModel:
    return ServedModel("m", 0, 1000, 100, 1, 1, "", **fields)


def request(prompt: TextPrompt | TokenPrompt, max_tokens: int | None) -> GenerationRequest:
    return GenerationRequest(
        model="m",
        prompts=[prompt],
        max_tokens=max_tokens,
        stop=[],
        top_logprobs=None,
        sampling=SamplingParams(),
        stream=False,
        ignored=[],
    )


def weight(
    prompt: TextPrompt | TokenPrompt, max_tokens: int | None, model: ServedModel, num_bytes: int
) -> int:
    return estimated_tokens(request(prompt, max_tokens), prompt, model, num_bytes)


def test_estimated_tokens() -> None:
    """Token ids are counted, text is estimated; an answer counts as max_tokens, else as the mean; both at most the context."""
    assert weight(TokenPrompt([1] * 30), 7, served(), 9999) == 37
    assert weight(TextPrompt("x"), 7, served(), 400) == 108
    assert weight(TextPrompt("x"), None, served(), 400) == 101 + 256
    assert weight(TextPrompt("x"), None, served(mean_tokens=50.4), 400) == 101 + 50
    assert weight(TextPrompt("x"), 10**9, served(), 10**9) == 2000


def test_estimated_tokens_in_an_id() -> None:
    """A job id encodes its estimated tokens, up to the largest that fits, and ids are unique."""
    assert names.estimated_tokens(names.new_job_id(1234)) == 1234
    assert names.estimated_tokens(names.new_job_id(10**12)) == names.MAX_ID_TOKENS
    assert len({names.new_job_id(5) for _ in range(100)}) == 100


@pytest.mark.parametrize(
    ("speed", "seconds"),
    [({}, 5.0), ({"tokens_per_second": 100.0, "mean_tokens": 50.0}, 20.0), ({"mean_tokens": 5.0}, 5.0)],
)
def test_retry_after(speed: dict[str, float], seconds: float) -> None:
    """The time that the waiting requests take at the measured speed, or a default without one."""
    error = refusal(served(**speed), 40, is_tokens=False)
    assert (error.status, error.code, error.type) == (429, "rate_limit_exceeded", "requests")
    assert error.retry_after_seconds == seconds
