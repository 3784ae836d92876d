"""What both kinds of requests share: decoding, the sampling fields, and the checks of values.

`decode` turns a body into a typed value once; the checks cover what types cannot express. Used by the parsers of chat and
completions. Must not know HTTP.
"""

from __future__ import annotations

import itertools
import re
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from api.generation.served_model import ServedModel
from common.errors import invalid
from common.protocol import SamplingParams

MAX_STOPS = 4

MAX_STOP_CHARACTERS = 1_000
"""Of a stop string: a worker compares it with the end of the text after each token."""

MAX_TOKENS = 2**31 - 1
MAX_SHOWN_CHARACTERS = 300
"""Characters of msgspec's message, which may quote the request."""

MAX_REPORTED_FIELDS = 32
"""Unknown fields that are reported: a body may have hundreds of thousands."""

MAX_NAME_CHARACTERS = 64
"""Of an unknown field's name, which may be as long as a body."""

GREEDY_TEMPERATURE = 0.0


def full_match(pattern: str) -> Meta:
    r"""A string that matches `pattern` from its beginning to its end.

    Python's `$` also matches before a final line break. JSON Schema's patterns are ECMA-262's, without `\Z`: they get
    `$` (`api.openapi`), and a `not` for validators in Python.
    """
    return Meta(pattern=rf"^{pattern}\Z", extra_json_schema={"not": {"pattern": "\n"}})


TokenCount = Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARACTERS)]
TokenIdKey = Annotated[str, full_match("(0|[1-9][0-9]{0,9})")]
"""As int, msgspec would accept `-0` too."""


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
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

B = TypeVar("B", bound=Body)

_decode_names = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_LOCATION = re.compile(
    r"^(?P<what>.*) - at (?:`key` in )?`\$\.?(?P<where>[^`]*)`$", re.DOTALL
)  # the last match: the message may quote the request
_LONE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_TYPES = re.compile(r"`[a-z]+(?: \| [a-z]+)*`")
_JSON_NAMES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}
_BEYOND_RANGE = re.compile(r"^(Expected .* [<>]=? .*|.*out of range)$")


def decode(body: bytes, decoder: msgspec.json.Decoder[B]) -> tuple[B, list[str]]:
    """A body as a typed value, and the names of its unknown fields, `MAX_REPORTED_FIELDS` at most.

    Raises:
        RequestError: 400, in `param` what is wrong.
    """
    if not body:
        raise invalid("The request has no body; a JSON object is required.")
    try:
        body.decode()  # msgspec does not check what it skips
        value = decoder.decode(body)
        names = _decode_names(body)
    except UnicodeDecodeError:
        raise invalid("The request body is not valid UTF-8.") from None
    except RecursionError:
        raise invalid("The request body is nested too deeply.") from None
    except msgspec.ValidationError as error:
        raise _refused(str(error)) from None
    except msgspec.DecodeError as error:
        if _LONE_SURROGATE.search(body):
            raise invalid("The request body has an unpaired surrogate in a string.") from None
        raise invalid(f"The request body is not valid JSON: {error}.") from None
    known = frozenset(value.__struct_fields__)
    return value, list(itertools.islice((name for name in names if name not in known), MAX_REPORTED_FIELDS))


def _refused(message: str) -> Exception:
    """msgspec's message, with the field's name in `param`."""
    found = _LOCATION.match(message)
    what = (found["what"] if found else message).replace(" | null", "")
    param = found["where"].replace("[...]", "") or None if found else None
    missing = re.match(r"Object missing required field `(.*)`", what)
    if missing:
        param = f"{param}.{missing[1]}" if param else missing[1]
    if unknown := re.match(r"Object contains unknown field `(.*)`", what):
        param = f"{param}.{unknown[1][:MAX_NAME_CHARACTERS]}"
        return invalid(f"Unknown parameter: `{param}`.", param, "unknown_parameter")
    if param is None:
        return invalid(f"The request body is invalid: {_in_json_names(message)}.")
    code = "value_out_of_range" if _BEYOND_RANGE.match(what) else None
    what = _in_json_names(what)
    return invalid(
        f"Invalid value for `{param}`: {what[0].lower()}{what[1:MAX_SHOWN_CHARACTERS]}.", param, code
    )


def _in_json_names(what: str) -> str:
    """With JSON's names of types; msgspec 0.22 uses Python's for some."""
    if not what.startswith("Expected "):  # it may quote the request
        return what
    expected, got, came = what.partition(", got ")
    # An integer is a number too, so `number` instead of `float` would not say what is wrong.
    if "`int" not in expected or came != "`float`":
        came = _TYPES.sub(_json_name, came)
    return _TYPES.sub(_json_name, expected) + got + came


def _json_name(found: re.Match[str]) -> str:
    names = found[0].strip("`").split(" | ")
    return f"`{' | '.join(_JSON_NAMES.get(name, name) for name in names)}`"


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
