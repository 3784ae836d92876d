"""`POST /v1/completions`: the body, parsed once into a typed and checked value.

https://platform.openai.com/docs/api-reference/completions/create; what is not supported is refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from api import request_fields as fields
from api.generation_request import GenerationRequest
from api.model_directory import ServedModel
from common.errors import invalid
from common.protocol import TextPrompt, TokenPrompt

DEFAULT_MAX_TOKENS = 16

TokenId = Annotated[int, Meta(extra_json_schema={"minimum": 0})]  # checked with its model's vocabulary
TokenIds = Annotated[list[TokenId], Meta(min_length=1)]
Prompts = Annotated[
    list[str | TokenId | TokenIds],
    Meta(
        min_length=1,
        # msgspec 0.22 takes one kind of list in a union
        extra_json_schema={"oneOf": [{"items": {"type": kind}} for kind in ("string", "integer", "array")]},
    ),
]


class CompletionBody(fields.Body, frozen=True, kw_only=True):
    """The fields of OpenAI's description."""

    prompt: str | Prompts
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    best_of: Annotated[int, Meta(ge=1, le=20)] | None = None
    echo: bool | None = None
    suffix: str | None = None


NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    **fields.NEUTRAL,
    "best_of": (1,),
    "echo": (False,),
    "suffix": (),
}

ONLY_WITH = fields.ONLY_WITH

_decoder = msgspec.json.Decoder(CompletionBody)


def parse(body: bytes) -> GenerationRequest:
    """Read and check a request.

    Raises:
        RequestError: 400, in `param` what is wrong or not supported.
    """
    completion, ignored = fields.decode(body, _decoder)
    fields.check_neutral(completion, NEUTRAL)
    fields.check_only_with(completion, ONLY_WITH)
    return GenerationRequest(
        model=completion.model,
        prompt=_prompt(completion.prompt),
        max_tokens=completion.max_tokens or DEFAULT_MAX_TOKENS,
        stop=fields.stops(completion),
        top_logprobs=completion.logprobs,
        sampling=fields.sampling(completion),
        stream=bool(completion.stream),
        include_usage=completion.stream_options is not None and bool(completion.stream_options.include_usage),
        service_tier="default" if completion.service_tier is not None else None,
        ignored=ignored,
    )


def _prompt(prompt: str | list[str | int | list[int]]) -> TextPrompt | TokenPrompt:
    """One text or one list of token ids; OpenAI also takes a list of one of either."""
    if isinstance(prompt, str):
        return TextPrompt(prompt)
    kinds = {type(item) for item in prompt}
    if len(kinds) > 1:
        raise invalid("`prompt` mixes strings, token ids and lists of them.", "prompt")
    if kinds == {int}:
        return TokenPrompt([item for item in prompt if isinstance(item, int)])
    if len(prompt) > 1:
        raise invalid(
            f"Several prompts in one request ({len(prompt)} here) are not supported yet.",
            "prompt",
            "unsupported_parameter",
        )
    only = prompt[0]
    if isinstance(only, str):
        return TextPrompt(only)
    assert isinstance(only, list)
    return TokenPrompt(only)


def check_prompt(request: GenerationRequest, model: ServedModel) -> None:
    """Raises:
    RequestError: 400, a token id is outside of the model's vocabulary.
    """
    if not isinstance(request.prompt, TokenPrompt):
        return
    for token_id in request.prompt.token_ids:
        if not 0 <= token_id < model.vocab_size:
            raise invalid(
                f"`prompt` has the token id {token_id}, which is outside of the vocabulary of {model.vocab_size}.",
                "prompt",
            )
