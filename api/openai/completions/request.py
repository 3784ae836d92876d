"""Parses the body of `POST /v1/completions` into a typed and checked value.

https://platform.openai.com/docs/api-reference/completions/create. Unsupported parameters are refused by name, not ignored.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from api.generation.request import GenerationRequest, unset
from api.generation.served_model import ServedModel
from api.http.json_body import BodyDecoder
from api.openai import request_fields as fields
from api.openai.answer import AnswerOptions
from common.errors import invalid
from common.protocol import ChatPrompt, TextPrompt, TokenPrompt

DEFAULT_MAX_TOKENS = 16

TokenId = Annotated[int, Meta(extra_json_schema={"minimum": 0})]  # the upper bound is the model's vocabulary
TokenIds = Annotated[list[TokenId], Meta(min_length=1)]
Prompts = Annotated[
    list[str | TokenId | TokenIds],
    Meta(
        min_length=1,
        # msgspec 0.22 accepts one kind of list in a union
        extra_json_schema={"oneOf": [{"items": {"type": kind}} for kind in ("string", "integer", "array")]},
    ),
]


class CompletionBody(fields.Body, frozen=True, kw_only=True):
    """The fields of OpenAI's description."""

    prompt: str | Prompts | None
    max_tokens: Annotated[int, Meta(ge=0, le=fields.MAX_TOKENS)] | None = None
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    best_of: Annotated[int, Meta(ge=1, le=20)] | None = None
    echo: bool | None = None
    suffix: str | None = None


NEUTRAL = fields.NEUTRAL
ONLY_WITH = fields.ONLY_WITH

_decoder = BodyDecoder(CompletionBody)


def parse(body: bytes) -> GenerationRequest:
    """Parse and check a request.

    Raises:
        RequestError: 400, in `param` what is wrong or not supported.
    """
    completion, ignored = _decoder.decode(body)
    fields.check_neutral(completion, NEUTRAL)
    fields.check_only_with(completion, ONLY_WITH)
    n = completion.n or 1
    return GenerationRequest(
        model=completion.model,
        prompts=_with_suffix(_prompts(completion.prompt), completion),
        n=n,
        best_of=_best_of(completion, n),
        echo=bool(completion.echo),
        max_tokens=DEFAULT_MAX_TOKENS if completion.max_tokens is None else completion.max_tokens,
        stop=fields.stops(completion),
        top_logprobs=completion.logprobs,
        sampling=fields.sampling(completion),
        unset=unset(completion),
        stream=bool(completion.stream),
        ignored=ignored,
        options=AnswerOptions(
            include_usage=completion.stream_options is not None
            and bool(completion.stream_options.include_usage),
            service_tier="default" if completion.service_tier is not None else None,
            with_logprobs=completion.logprobs is not None,
        ),
    )


def _best_of(completion: CompletionBody, n: int) -> int:
    if completion.best_of is None:
        return n
    if completion.best_of < n:
        raise invalid(f"`best_of` must be at least `n`, which is {n}.", "best_of")
    if completion.stream and completion.best_of > n:
        raise invalid("`best_of` cannot be streamed: the best choice is known only at the end.", "best_of")
    return completion.best_of


def _prompts(prompt: str | list[str | int | list[int]] | None) -> list[TextPrompt | TokenPrompt]:
    """A text, a list of token ids, or a list of several of either; null is an empty text."""
    if prompt is None:
        return [TextPrompt("")]
    if isinstance(prompt, str):
        return [TextPrompt(prompt)]
    kinds = {type(item) for item in prompt}
    if len(kinds) > 1:
        raise invalid("`prompt` must not mix strings, token ids and lists of token ids.", "prompt")
    if kinds == {int}:
        return [TokenPrompt([item for item in prompt if isinstance(item, int)])]
    return [_prompt(item) for item in prompt]


def _prompt(prompt: str | int | list[int]) -> TextPrompt | TokenPrompt:
    if isinstance(prompt, str):
        return TextPrompt(prompt)
    assert isinstance(prompt, list)
    return TokenPrompt(prompt)


def _with_suffix(
    prompts: list[TextPrompt | TokenPrompt], completion: CompletionBody
) -> list[ChatPrompt | TextPrompt | TokenPrompt]:
    if not completion.suffix:
        return [*prompts]
    if completion.echo:
        raise invalid("`echo` cannot be combined with `suffix`.", "echo")
    filled: list[ChatPrompt | TextPrompt | TokenPrompt] = []
    for prompt in prompts:
        if not isinstance(prompt, TextPrompt):
            raise invalid("With `suffix`, `prompt` must be text.", "suffix")
        filled.append(TextPrompt(prompt.text, completion.suffix))
    return filled


def check_prompts(request: GenerationRequest, model: ServedModel) -> None:
    """Raises:
    RequestError: 400, a token id is outside the model's vocabulary, or the model cannot fill a gap.
    """
    for prompt in request.prompts:
        if isinstance(prompt, TextPrompt) and prompt.suffix is not None and not model.can_fill:
            raise invalid(
                f"The model `{model.id}` does not support `suffix`: it has no fill-in-the-middle tokens.",
                "suffix",
            )
        for token_id in prompt.token_ids if isinstance(prompt, TokenPrompt) else ():
            if not 0 <= token_id < model.vocab_size:
                raise invalid(
                    f"`prompt` has the token id {token_id}, which is outside the model's vocabulary of {model.vocab_size} tokens.",
                    "prompt",
                )
