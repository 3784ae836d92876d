"""Parses the body of `POST /v1/completions` into a typed and checked value.

https://platform.openai.com/docs/api-reference/completions/create. A field is honored, refused by name, or
ignored and named; docs/parameters.md has the decisions.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from api.generation.request import GenerationRequest
from api.generation.served_model import ServedModel
from api.http.json_body import BodyDecoder
from api.openai.answer import AnswerOptions
from api.openai.fields import body as fields
from api.openai.fields import response_format
from api.openai.fields.response_format import FormatFields
from common.errors import invalid
from common.protocol import ChatPrompt, TextPrompt, TokenPrompt

DEFAULT_MAX_TOKENS = 16

MAX_LOGPROBS = 20
"""As in chats; OpenAI's limit is 5, and evaluation tools ask for 10."""

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


class CompletionBody(FormatFields, frozen=True, kw_only=True):
    """The fields of OpenAI's description, and those that vLLM and llama.cpp have in addition."""

    prompt: str | Prompts | None
    max_tokens: Annotated[int, Meta(ge=-1, le=fields.MAX_TOKENS)] | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Annotated[int, Meta(ge=1, le=20)] | None = None
    echo: bool | None = None
    suffix: str | None = None


NEUTRAL = fields.NEUTRAL
ONLY_WITH = fields.ONLY_WITH
INEFFECTIVE = fields.INEFFECTIVE

MAX_TOKENS_FIELDS = ("max_tokens", "n_predict")
"""OpenAI's, and llama.cpp's."""

_decoder = BodyDecoder(CompletionBody)


def parse(body: bytes) -> GenerationRequest:
    """Parse and check a request.

    Raises:
        RequestError: 400, in `param` what is wrong or not supported.
    """
    completion, ignored = _decoder.decode(body)
    fields.check_neutral(completion, NEUTRAL)
    ignored += fields.ineffective(completion, INEFFECTIVE)
    answer_grammar = response_format.grammar_of(completion, ignored)
    stream_options = fields.stream_options(completion)
    n = completion.n or 1
    return GenerationRequest(
        model=completion.model,
        prompts=_with_suffix(_prompts(completion.prompt), completion),
        n=n,
        best_of=_best_of(completion, n),
        echo=bool(completion.echo),
        max_tokens=fields.max_tokens(completion, MAX_TOKENS_FIELDS, ignored, DEFAULT_MAX_TOKENS),
        stop=fields.stops(completion),
        includes_stop=bool(completion.include_stop_str_in_output),
        top_logprobs=completion.logprobs,
        sampling=fields.sampling(completion, ignored),
        unset=fields.unset_sampling(completion),
        stream=bool(completion.stream),
        options=AnswerOptions(
            include_usage=bool(stream_options.include_usage),
            continuous_usage=bool(stream_options.continuous_usage_stats),
            service_tier="default" if completion.service_tier is not None else None,
            with_logprobs=completion.logprobs is not None,
        ),
        journals_started=bool(stream_options.continuous_usage_stats),
        grammar=None if answer_grammar is None else answer_grammar.text,
        grammar_field=None if answer_grammar is None else answer_grammar.field,
        ignored=ignored,
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
