"""A request body as a typed value, and the checks of bodies that all protocols share.

A protocol's parser makes one `BodyDecoder` for each of its body types. Types cannot express every rule; what is left, the
parsers check. Independent of protocols.
"""

from __future__ import annotations

import re
from typing import Any, Generic, TypeVar

import msgspec
from msgspec import Meta

from api.http.unknown_keys import MAX_NAME_CHARACTERS, UnknownKeys
from common.errors import RequestError, invalid

MAX_SHOWN_CHARACTERS = 300
"""Characters of msgspec's message, which may quote the request."""

B = TypeVar("B", bound=msgspec.Struct)

_LOCATION = re.compile(
    r"^(?P<what>.*) - at (?P<of_key>`key` in )?`\$\.?(?P<where>[^`]*)`$", re.DOTALL
)  # the last match: the message may quote the request
_LONE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_TYPES = re.compile(r"`[a-z]+(?: \| [a-z]+)*`")
_JSON_NAMES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}
_BEYOND_RANGE = re.compile(r"^(Expected .* [<>]=? .*|.*out of range)$")
_MAX_WHOLE = 2.0**63  # 64 bits


def full_match(pattern: str) -> Meta:
    r"""A string that matches `pattern` from its beginning to its end.

    Python's `$` also matches before a final line break. JSON Schema's patterns are ECMA-262's, without `\Z`: they get
    `$` (`api.openapi`), and a `not` for validators in Python.
    """
    return Meta(pattern=rf"^{pattern}\Z", extra_json_schema={"not": {"pattern": "\n"}})


class BodyDecoder(Generic[B]):
    """Decodes bodies of one type."""

    def __init__(self, body_type: type[B]) -> None:
        self._decode = msgspec.json.Decoder(body_type).decode
        self._unknown_keys = UnknownKeys(body_type)

    def decode(self, body: bytes) -> tuple[B, list[str]]:
        """A body as a typed value, and the paths of its unknown keys (`UnknownKeys.find`).

        Raises:
            RequestError: 400, in `param` what is wrong.
        """
        if not body:
            raise invalid("The request has no body; a JSON object is required.")
        try:
            body.decode()  # msgspec does not check what it skips
            return self._typed(body), [*self._unknown_keys.find(body)]
        except UnicodeDecodeError:
            raise invalid("The request body is not valid UTF-8.") from None
        except RecursionError:
            raise invalid("The request body is nested too deeply.") from None
        except msgspec.ValidationError as error:
            raise refusal(str(error)) from None
        except msgspec.DecodeError as error:
            if _LONE_SURROGATE.search(body):
                raise invalid("The request body has an unpaired surrogate in a string.") from None
            raise invalid(f"The request body is not valid JSON: {error}.") from None

    def _typed(self, body: bytes) -> B:
        """In JSON, 5.0 is an integer too; msgspec 0.22 accepts only 5, so such numbers are rewritten if it refuses the body."""
        try:
            return self._decode(body)
        except msgspec.ValidationError as error:
            if "got `float`" not in str(error):
                raise
            try:
                value = msgspec.json.decode(body)
            except (
                msgspec.DecodeError
            ):  # an integer with more digits than Python converts, where it has no effect
                raise error from None
            return self._decode(msgspec.json.encode(_with_whole_numbers(value)))


def _with_whole_numbers(value: Any) -> Any:
    """A JSON value whose whole numbers are integers."""
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < _MAX_WHOLE else value
    if isinstance(value, list):
        return [_with_whole_numbers(item) for item in value]
    if isinstance(value, dict):
        return {key: _with_whole_numbers(item) for key, item in value.items()}
    return value


def refusal(message: str, path: str = "") -> RequestError:
    """msgspec's message as a 400, with the field's name in `param`.

    Args:
        path: Of the object that did not validate; empty: the body.
    """
    found = _LOCATION.match(message)
    what = (found["what"] if found else message).replace(" | null", "")
    where = found["where"].replace("[...]", "") if found else ""
    param = f"{path}.{where}".strip(".") or None
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
