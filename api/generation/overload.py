"""What a request weighs in its queue before a worker has seen it, and what is told to one that finds no room there.

Pure; called by the generations. The API has no tokenizer: weights are estimates, for a bound that needs no more.
"""

from __future__ import annotations

from api.generation.model_directory import ServedModel
from api.generation.request import GenerationRequest, Prompt
from common.errors import RequestError
from common.protocol import TokenPrompt

_BYTES_PER_TOKEN = 4
"""Of English text and most tokenizers; other scripts have up to a token a byte."""

_ANSWER_TOKENS = 256
"""Of a request that sets no limit, while nothing is known of the model's answers."""

_RETRY_AFTER_SECONDS = 5.0
"""While nothing is known of the model's speed."""


def estimated_tokens(request: GenerationRequest, prompt: Prompt, model: ServedModel, num_bytes: int) -> int:
    """One prompt of the request, and one answer.

    Args:
        num_bytes: The size of the request's body.
    """
    num_prompt = 1 + num_bytes // (_BYTES_PER_TOKEN * len(request.prompts))
    if isinstance(prompt, TokenPrompt):
        num_prompt = len(prompt.token_ids)
    usual = int(model.mean_tokens) or _ANSWER_TOKENS
    num_answer = usual if request.max_tokens is None else request.max_tokens
    return min(num_prompt, model.context_length) + min(num_answer, model.context_length)


def refusal(model: ServedModel, num_waiting: int, *, is_tokens: bool) -> RequestError:
    """A 429, of OpenAI's form for requests or for tokens; retry-after is how long what waits now takes to be begun."""
    seconds = model.seconds_for(num_waiting)
    what = "tokens" if is_tokens else "requests"
    return RequestError(
        f"Too many {what} wait for the model `{model.id}`: {num_waiting} requests are before this one. Try again later.",
        status=429,
        type=what,
        code="rate_limit_exceeded",
        retry_after_seconds=_RETRY_AFTER_SECONDS if seconds is None else max(1.0, seconds),
    )
