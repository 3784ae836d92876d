"""What both kinds of requests share: decoding, the fields that choose tokens, and what is refused.

`decode` turns a body into a typed value once; the checks say what types cannot. Used by `chat_request` and
`completion_request`. Knows the OpenAI API description, no model and no HTTP.
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
MAX_TOKENS = 2**31 - 1
MAX_SHOWN = 300
"""Characters of msgspec's words, which may repeat what came."""

MAX_NAMED = 32
"""Unknown fields that are told; looking for a body's hundreds of thousands holds up the process's streams."""

MAX_NAME_SHOWN = 64
"""Of a field that nobody knows: its name may be as long as a body."""

GREEDY_TEMPERATURE = 0.0


def whole(pattern: str) -> Meta:
    r"""A string that matches `pattern` from its beginning to its end.

    Python's `$` lets a line break through. JSON Schema's expressions, which are ECMA-262's, know no `\Z`: it is told with
    `$` (`api.openapi`), and for readers in Python without a line break.
    """
    return Meta(pattern=rf"^{pattern}\Z", extra_json_schema={"not": {"pattern": "\n"}})


TokenCount = Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
StopString = Annotated[str, Meta(min_length=1)]
TokenIdKey = Annotated[str, whole("(0|[1-9][0-9]{0,9})")]
"""As int, msgspec would take `-0` too."""


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`include_obfuscation` pads chunks against eavesdroppers; it asks nothing of the answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Body(msgspec.Struct, frozen=True, kw_only=True):
    """Fields of both kinds of requests; None is also an explicit null, which means the default.

    Those typed `Any` are known to OpenAI and are not supported at any value but a neutral one; see `NEUTRAL`.
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
"""Values beside null that ask for what is done anyway, by field."""

ONLY_WITH: Mapping[str, str] = {"stream_options": "stream"}
"""Fields that may be given only where another one is true."""

B = TypeVar("B", bound=Body)

_decode_names = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_PLACE = re.compile(
    r"^(?P<what>.*) - at (?:`key` in )?`\$\.?(?P<where>[^`]*)`$", re.DOTALL
)  # the last: words may be quoted
_HALF_A_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")
_TYPES = re.compile(r"`[a-z]+(?: \| [a-z]+)*`")
_JSON_NAMES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}
_BEYOND_RANGE = re.compile(r"^(Expected .* [<>]=? .*|.*out of range)$")


def decode(body: bytes, decoder: msgspec.json.Decoder[B]) -> tuple[B, list[str]]:
    """A body as a typed value, and the names of fields that nobody knows, `MAX_NAMED` at most.

    Raises:
        RequestError: 400, in `param` what is wrong.
    """
    if not body:
        raise invalid("The request has no body; a JSON object is expected.")
    try:
        body.decode()  # msgspec does not look into what it skips
        value = decoder.decode(body)
        names = _decode_names(body)
    except UnicodeDecodeError:
        raise invalid("The request body is not valid UTF-8.") from None
    except RecursionError:
        raise invalid("The request body is nested too deeply.") from None
    except msgspec.ValidationError as error:
        raise _refused(str(error)) from None
    except msgspec.DecodeError as error:
        if _HALF_A_PAIR.search(body):
            raise invalid("The request body has half a surrogate pair in a string.") from None
        raise invalid(f"The request body is not valid JSON: {error}.") from None
    known = frozenset(value.__struct_fields__)
    return value, list(itertools.islice((name for name in names if name not in known), MAX_NAMED))


def _refused(message: str) -> Exception:
    """msgspec's words with the field's name in OpenAI's place."""
    found = _PLACE.match(message)
    what = (found["what"] if found else message).replace(" | null", "")
    param = found["where"].replace("[...]", "") or None if found else None
    missing = re.match(r"Object missing required field `(.*)`", what)
    if missing:
        param = f"{param}.{missing[1]}" if param else missing[1]
    if unknown := re.match(r"Object contains unknown field `(.*)`", what):
        param = f"{param}.{unknown[1][:MAX_NAME_SHOWN]}"
        return invalid(f"Unknown parameter: `{param}`.", param, "unknown_parameter")
    if param is None:
        return invalid(f"The request body is not what it should be: {_in_json_names(message)}.")
    code = "value_out_of_range" if _BEYOND_RANGE.match(what) else None
    what = _in_json_names(what)
    return invalid(f"Invalid value for `{param}`: {what[0].lower()}{what[1:MAX_SHOWN]}.", param, code)


def _in_json_names(what: str) -> str:
    """msgspec (0.22) calls some types as Python does: a client knows those of JSON."""
    if not what.startswith("Expected "):  # it may quote the client
        return what
    expected, got, came = what.partition(", got ")
    # In JSON an integer is a number, too: `float` says what came instead.
    if "`int" not in expected or came != "`float`":
        came = _TYPES.sub(_json_name, came)
    return _TYPES.sub(_json_name, expected) + got + came


def _json_name(found: re.Match[str]) -> str:
    names = found[0].strip("`").split(" | ")
    return f"`{' | '.join(_JSON_NAMES.get(name, name) for name in names)}`"


def check_neutral(body: Body, neutral: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse what OpenAI knows and this server cannot do.

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
    """A 400 for what may be supported one day."""
    allowed = f"; it can be left out or be {' or '.join(_shown(v) for v in values)}" if values else ""
    return invalid(f"`{param}` is not supported yet{allowed}.", param, "unsupported_parameter")


def _shown(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def check_only_with(body: Body, only_with: Mapping[str, str]) -> None:
    """Raises:
    RequestError: 400, a field is there without the one that it goes with.
    """
    for name, other in only_with.items():
        if getattr(body, name) is not None and not getattr(body, other):
            raise invalid(f"`{name}` is only allowed with `{other}: true`.", name)


def stops(body: Body) -> list[str]:
    """The stop strings; may be none."""
    return [body.stop] if isinstance(body.stop, str) else body.stop or []


def sampling(body: Body) -> SamplingParams:
    """How tokens are chosen; the seed is drawn where the client gave none."""
    defaults = SamplingParams()
    temperature = defaults.temperature if body.temperature is None else body.temperature
    top_p = defaults.top_p if body.top_p is None else body.top_p
    if top_p == 0:  # in the limit, only the most likely token is left
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
    RequestError: 400, a token id is outside of the model's vocabulary.
    """
    for token_id in params.logit_bias:
        if not 0 <= token_id < model.vocab_size:
            raise invalid(
                f"`logit_bias` has the token id {token_id}, which is outside of the vocabulary of {model.vocab_size}.",
                "logit_bias",
            )
