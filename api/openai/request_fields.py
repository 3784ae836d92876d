"""What both kinds of requests share: the sampling fields, and the checks of values that types cannot express.

Used by the parsers of chat and completions, which decode bodies with `api.http.json_body`. Must not know HTTP.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from api.generation.served_model import ServedModel
from api.http.json_body import full_match
from common.errors import invalid
from common.protocol import SamplingParams

MAX_STOPS = 4

MAX_STOP_CHARACTERS = 1_000
"""Of a stop string: a worker compares it with the end of the text after each token."""

MAX_TOKENS = 2**31 - 1
GREEDY_TEMPERATURE = 0.0


TokenCount = Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARACTERS)]
TokenIdKey = Annotated[str, full_match("(0|[1-9][0-9]{0,9})")]
"""As int, msgspec would accept `-0` too."""


class StreamOptions(msgspec.Struct, frozen=True):
    """`include_obfuscation` pads chunks against eavesdroppers; it has no effect here."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Body(msgspec.Struct, frozen=True, kw_only=True):
    """Fields of both kinds of requests; None is also an explicit null, which means the default.

    Those typed `Any` are parts of OpenAI's API that are supported only with the values of `NEUTRAL`.
    """

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: TokenCount | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOPS)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    repetition_context_size: TokenCount | None = None
    logit_bias: dict[TokenIdKey, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    service_tier: str | None = None
    user: str | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    xtc_probability: Annotated[float, Meta(ge=0, le=1)] | None = None
    xtc_threshold: Annotated[float, Meta(ge=0, le=0.5)] | None = None


NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "service_tier": ("auto", "default"),
}
"""Values other than null that have no effect, by field."""

ONLY_WITH: Mapping[str, str] = {"stream_options": "stream"}
"""Fields that may be given only if another one is true."""


def check_neutral(body: Body, neutral: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse parts of OpenAI's API that are not supported.

    Raises:
        RequestError: 400.
    """
    for name, values in neutral.items():
        value = getattr(body, name)
        if value is None or any(
            value == v and isinstance(value, bool) == isinstance(v, bool) for v in values
        ):
            continue
        raise unsupported(name, values)


def unsupported(param: str, values: tuple[Any, ...] = ()) -> Exception:
    """A 400 for a part of OpenAI's API that is not supported."""
    allowed = f"; omit it or set it to {' or '.join(_shown(v) for v in values)}" if values else ""
    return invalid(f"`{param}` is not supported yet{allowed}.", param, "unsupported_parameter")


def _shown(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def check_only_with(body: Body, only_with: Mapping[str, str]) -> None:
    """Raises:
    RequestError: 400, a field is given without the one that it requires.
    """
    for name, other in only_with.items():
        if getattr(body, name) is not None and not getattr(body, other):
            raise invalid(f"`{name}` is only allowed with `{other}: true`.", name)


def stops(body: Body) -> list[str]:
    """The stop strings."""
    return [body.stop] if isinstance(body.stop, str) else body.stop or []


def sampling(body: Body) -> SamplingParams:
    """The sampling parameters, with a random seed if the client gave none."""
    defaults = SamplingParams()
    temperature = defaults.temperature if body.temperature is None else body.temperature
    top_p = defaults.top_p if body.top_p is None else body.top_p
    if top_p == 0:  # in the limit, only the most likely token remains
        top_p, temperature = 1.0, GREEDY_TEMPERATURE
    return SamplingParams(
        temperature=temperature,
        top_p=top_p,
        seed=secrets.randbits(63) if body.seed is None else body.seed,
        repetition_penalty=defaults.repetition_penalty
        if body.repetition_penalty is None
        else body.repetition_penalty,
        repetition_context_size=body.repetition_context_size or defaults.repetition_context_size,
        logit_bias={int(token_id): bias for token_id, bias in (body.logit_bias or {}).items()},
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        top_k=max(0, body.top_k or 0),  # -1 is off in vLLM, 0 in mlx_lm.server
        min_p=body.min_p or 0.0,
        xtc_probability=body.xtc_probability or 0.0,
        xtc_threshold=defaults.xtc_threshold if body.xtc_threshold is None else body.xtc_threshold,
    )


def check_logit_bias(params: SamplingParams, model: ServedModel) -> None:
    """Raises:
    RequestError: 400, a token id is outside the model's vocabulary.
    """
    for token_id in params.logit_bias:
        if not 0 <= token_id < model.vocab_size:
            raise invalid(
                f"`logit_bias` has the token id {token_id}, which is outside the model's vocabulary of {model.vocab_size} tokens.",
                "logit_bias",
            )
