"""The fields that every request for an answer has, sampling above all, and the checks of values that types cannot express.

Used by the parsers of chats, legacy completions and responses, which decode bodies with `api.http.json_body`. Must not know HTTP.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from api.generation import request
from api.generation.served_model import ServedModel
from api.http.unknown_keys import MAX_NAME_CHARACTERS
from common.errors import invalid
from common.protocol import SamplingParams

MAX_STOPS = 64
"""OpenAI's limit is 4; chat front ends for local servers send more."""

MAX_STOP_CHARACTERS = 1_000
"""Of a stop string: a worker compares it with the end of the text after each token."""

MAX_TOKENS = 2**31 - 1

GREEDY_TEMPERATURE = 0.0

_NO_LIMIT = -1
"""As a number of tokens: as in llama.cpp and LM Studio."""

_RANDOM_SEED = -1
"""As in vLLM, llama.cpp and LM Studio."""


TokenCount = Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
MaxTokens = Annotated[int, Meta(ge=_NO_LIMIT, le=MAX_TOKENS, extra_json_schema={"not": {"const": 0}})]
"""Of an answer that has at least one token."""

TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
StopString = Annotated[str, Meta(max_length=MAX_STOP_CHARACTERS)]


Bias = Annotated[float, Meta(ge=-100, le=100)]
_ID_PATTERN = "(0|[1-9][0-9]{0,9})"  # int() would accept `-0` and `1_0` too
LogitBias = Annotated[
    dict[str, Bias], Meta(extra_json_schema={"propertyNames": {"pattern": f"^{_ID_PATTERN}$"}})
]


class StreamOptions(msgspec.Struct, frozen=True):
    """`include_obfuscation` pads chunks against eavesdroppers; it has no effect here. `continuous_usage_stats` is vLLM's."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class Body(msgspec.Struct, frozen=True, kw_only=True):
    """Fields of all requests; None is also an explicit null, which means the default.

    Most are OpenAI's. Those of other servers: `top_k`, `min_p`, `repetition_penalty`, `min_tokens`, `ignore_eos`,
    `stop_token_ids` and `include_stop_str_in_output` are vLLM's;
    `n_predict`, `repeat_penalty` and `repeat_last_n` are llama.cpp's names of fields that are here too. docs/parameters.md says what
    each one does. Those typed `Any` have no effect (`INEFFECTIVE`), or are supported only with some values (`NEUTRAL`).
    """

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: MaxTokens | None = None
    n_predict: MaxTokens | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=MAX_TOKENS)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOPS)] | None = None
    include_stop_str_in_output: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOPS)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    repeat_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    repetition_context_size: TokenCount | None = None
    repeat_last_n: Annotated[int, Meta(ge=-1, le=MAX_TOKENS)] | None = None
    logit_bias: LogitBias | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    service_tier: str | None = None
    user: Any = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    xtc_probability: Annotated[float, Meta(ge=0, le=1)] | None = None
    xtc_threshold: Annotated[float, Meta(ge=0, le=0.5)] | None = None


INEFFECTIVE: Mapping[str, tuple[Any, ...]] = {
    "service_tier": ("auto", "default"),
}
"""Fields without an effect here, with the values that mean just that. Any other value is reported as ignored."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {}
"""Fields that would change the answer and are not supported, with the values other than null that do not change it."""


ONLY_WITH: Mapping[str, str] = {}
"""Fields that may ask for something only if another one is true."""


def check_neutral(body: Body, neutral: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse parts of OpenAI's API that are not supported.

    Raises:
        RequestError: 400.
    """
    for name, values in neutral.items():
        if not _is_one_of(getattr(body, name), values):
            raise unsupported(name, values)


def ineffective(body: Body, fields: Mapping[str, tuple[Any, ...]]) -> list[str]:
    """The names of `fields` (as `INEFFECTIVE`) that ask for something, and of stream options without a stream."""
    names = [name for name, values in fields.items() if not _is_one_of(getattr(body, name), values)]
    if (
        body.stream_options is not None
        and not body.stream
        and any(msgspec.structs.astuple(body.stream_options))
    ):
        names.append("stream_options")
    return names


def _is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    """Whether a value is null or equal to one of these; true is not equal to 1."""
    return value is None or any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in values)


def unsupported(param: str, values: tuple[Any, ...] = ()) -> Exception:
    """A 400 for a part of OpenAI's API that is not supported."""
    allowed = f"; omit it or set it to {' or '.join(_shown(v) for v in values)}" if values else ""
    return invalid(f"`{param}` is not supported yet{allowed}.", param, "unsupported_parameter")


def _shown(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def check_only_with(body: Body, only_with: Mapping[str, str]) -> None:
    """Check fields that need another one.

    Args:
        only_with: As `ONLY_WITH`.

    Raises:
        RequestError: 400, a field is given without the one that it requires.
    """
    for name, other in only_with.items():
        if getattr(body, name) and not getattr(body, other):
            raise invalid(f"`{name}` is only allowed with `{other}: true`.", name)


def stream_options(body: Body) -> StreamOptions:
    """Those of a stream; without one, all are off."""
    return (body.stream_options if body.stream else None) or StreamOptions()


def stops(body: Body) -> list[str]:
    """The stop strings; an empty one stops nothing."""
    given = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return [stop for stop in given if stop]


def first_given(body: Body, names: Sequence[str], ignored: list[str]) -> Any:
    """The value of several fields that mean the same: that of the first one that is not null.

    Args:
        names: The one that takes precedence first.
        ignored: The names of others with another value are added to it.
    """
    given = [(name, value) for name in names if (value := getattr(body, name)) is not None]
    ignored += [name for name, value in given[1:] if value != given[0][1]]
    return given[0][1] if given else None


def max_tokens(
    body: Body, names: Sequence[str], ignored: list[str], default: int | None = None
) -> int | None:
    """The limit on the answer's tokens; None: up to the context. The first three arguments are those of `first_given`."""
    limit: int | None = first_given(body, names, ignored)
    if limit is None:
        return default
    return None if limit == _NO_LIMIT else limit


def check_max_tokens(body: Body, names: Sequence[str]) -> None:
    """Check the limits on the answer's tokens.

    Raises:
        RequestError: 400, a limit is 0.
    """
    for name in names:
        if getattr(body, name) == 0:
            raise invalid(f"`{name}` must be at least 1, or -1 for no limit.", name, "value_out_of_range")


def sampling(body: Body, ignored: list[str]) -> SamplingParams:
    """The sampling parameters, with a random seed if the client gave none.

    Args:
        ignored: As in `first_given`.

    Raises:
        RequestError: 400, a key of `logit_bias` is not a token id.
    """
    has_seed = body.seed is not None and body.seed != _RANDOM_SEED
    seed = body.seed if has_seed else secrets.randbits(63)
    return SamplingParams(seed=seed, **_given_sampling(body, ignored))  # type: ignore[arg-type]


def unset_sampling(body: Body) -> frozenset[str]:
    """As `api.generation.request.unset_sampling`."""
    return request.unset_sampling(_given_sampling(body, []))


def _given_sampling(body: Body, ignored: list[str]) -> dict[str, Any]:
    given: dict[str, Any] = {name: value for name in _AS_GIVEN if (value := getattr(body, name)) is not None}
    given |= _repetition(body, ignored)
    if body.top_k is not None:
        given["top_k"] = max(0, body.top_k)  # -1 is off in vLLM, 0 in mlx_lm.server
    if body.top_p == 0:  # in the limit, only the most likely token remains
        given |= {"top_p": 1.0, "temperature": GREEDY_TEMPERATURE}
    if body.stop_token_ids:
        given["stop_token_ids"] = list(dict.fromkeys(body.stop_token_ids))
    if body.logit_bias:
        given["logit_bias"] = _logit_bias(body.logit_bias)
    return given


_AS_GIVEN = (
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "min_p",
    "xtc_probability",
    "xtc_threshold",
    "min_tokens",
    "ignore_eos",
)
"""Fields with the name and the meaning that they have in `SamplingParams`."""


def _repetition(body: Body, ignored: list[str]) -> dict[str, Any]:
    """The repetition penalty and its window. llama.cpp's window may be 0, which turns the penalty off, or -1, the context."""
    penalty = first_given(body, ("repetition_penalty", "repeat_penalty"), ignored)
    window = first_given(body, ("repetition_context_size", "repeat_last_n"), ignored)
    if window == 0:
        return {"repetition_penalty": 1.0}
    given = {"repetition_penalty": penalty, "repetition_context_size": MAX_TOKENS if window == -1 else window}
    return {name: value for name, value in given.items() if value is not None}


def _logit_bias(biases: Mapping[str, float]) -> dict[int, float]:
    for key in biases:
        if not re.fullmatch(_ID_PATTERN, key):
            shown = key[:MAX_NAME_CHARACTERS]
            raise invalid(
                f"`logit_bias` has the key `{shown}`, which is not a token id; token ids are integers from 0.",
                f"logit_bias.{shown}",
            )
    return {int(key): bias for key, bias in biases.items()}


def check_token_ids(params: SamplingParams, model: ServedModel) -> None:
    """Check the token ids of sampling parameters.

    Raises:
        RequestError: 400, a token id is outside the model's vocabulary.
    """
    for name, token_ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
        for token_id in token_ids:
            if not 0 <= token_id < model.vocab_size:
                raise invalid(
                    f"`{name}` has the token id {token_id}, which is outside the model's vocabulary of {model.vocab_size} tokens.",
                    name,
                )
