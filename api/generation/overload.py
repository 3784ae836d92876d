"""The estimated tokens of a request in the queue, and the error for one that finds the queue full.

Pure; called by the endpoint. The API has no tokenizer: an estimate is enough for a bound.
"""

from __future__ import annotations

from api.generation.request import GenerationRequest, Prompt
from api.generation.served_model import ServedModel
from common.errors import RequestError
from common.protocol import TokenPrompt

_BYTES_PER_TOKEN = 4
"""Of English text with most tokenizers; other scripts have up to one token a byte."""

_ANSWER_TOKENS = 256
"""Of a request without `max_tokens`, while the model has no statistics yet."""

_RETRY_AFTER_SECONDS = 5.0
"""While the model has no statistics yet."""


def estimated_tokens(request: GenerationRequest, prompt: Prompt, model: ServedModel, num_bytes: int) -> int:
    """Of one prompt of the request with one answer.

    Args:
        num_bytes: The size of the request's body.
    """
    num_prompt = 1 + num_bytes // (_BYTES_PER_TOKEN * len(request.prompts))
    if isinstance(prompt, TokenPrompt):
        num_prompt = len(prompt.token_ids)
    return min(num_prompt, model.context_length) + estimated_answer_tokens(request, model)


def estimated_answer_tokens(request: GenerationRequest, model: ServedModel) -> int:
    """Of one answer."""
    expected = int(model.mean_tokens) or _ANSWER_TOKENS
    num_answer = expected if request.max_tokens is None else request.max_tokens
    return min(num_answer, model.context_length)


def refusal(model: ServedModel, num_waiting: int, *, is_tokens: bool) -> RequestError:
    """A 429 with OpenAI's type for requests or for tokens; retry-after is the estimated time until the queue is empty."""
    seconds = model.seconds_for(num_waiting)
    what = "tokens" if is_tokens else "requests"
    return RequestError(
        f"The queue of the model `{model.id}` is full: too many {what} are waiting, {num_waiting} requests in all. Try again later.",
        status=429,
        type=what,
        code="rate_limit_exceeded",
        retry_after_seconds=_RETRY_AFTER_SECONDS if seconds is None else max(1.0, seconds),
    )
