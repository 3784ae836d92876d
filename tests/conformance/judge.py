"""What is seen against what has to be seen: error objects, and values at places of an answer.

Pure; used for the declared behaviours of the catalogue and by the checks in code.
"""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec

from tests.conformance.server import Answer, NotShown, see

KEYS = {"message", "type", "param", "code"}

_ABSENT = object()
_KINDS: dict[str, Any] = {
    "string": lambda v: isinstance(v, str),
    "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "boolean": lambda v: isinstance(v, bool),
    "array": lambda v: isinstance(v, list),
    "object": lambda v: isinstance(v, dict),
    "null": lambda v: v is None,
    "absent": lambda v: v is _ABSENT,
    "null or absent": lambda v: v is None or v is _ABSENT,
}


class Seen(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What has to be at a place of the answer's JSON, such as `choices.0.message.role`; what is left out may be anything.

    Attributes:
        equals: As JSON text.
        same_as: Another place with the same value.
        count: Of an array's items.
    """

    at: str
    equals: str | None = None
    kind: str | None = None
    matches: str | None = None
    same_as: str | None = None
    count: int | None = None
    least: float | None = None


def check(answer: Answer, wanted: Seen) -> None:
    """Raises:
    NotShown: It is not there.
    """
    value = find(answer.json, wanted.at)
    shown = "nothing" if value is _ABSENT else json.dumps(value)[:60]
    if wanted.equals is not None:
        see(_same(value, json.loads(wanted.equals)), f"{wanted.at} is {shown}, not {wanted.equals}")
    if wanted.kind is not None:
        see(_KINDS[wanted.kind](value), f"{wanted.at} is {shown}, not {wanted.kind}")
    if wanted.matches is not None:
        see(isinstance(value, str) and re.search(wanted.matches, value), f"{wanted.at} is {shown}")
    if wanted.same_as is not None:
        other = find(answer.json, wanted.same_as)
        see(value is not _ABSENT and value == other, f"{wanted.at} is {shown}, unlike {wanted.same_as}")
    if wanted.count is not None:
        see(isinstance(value, list) and len(value) == wanted.count, f"{wanted.at} is {shown}")
    if wanted.least is not None:
        see(_KINDS["number"](value) and value >= wanted.least, f"{wanted.at} is {shown}")


def find(value: Any, place: str) -> Any:
    """What is at a place."""
    for name in place.split(".") if place else ():
        if isinstance(value, list) and name.isdigit() and int(name) < len(value):
            value = value[int(name)]
        elif isinstance(value, dict) and name in value:
            value = value[name]
        else:
            return _ABSENT
    return value


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and one == other


def check_error(
    answer: Answer,
    status: int,
    *,
    param: str | None = None,
    code: str | None = None,
    kind: str = "invalid_request_error",
) -> None:
    """An error in OpenAI's form, with all that belongs to it.

    Args:
        param: None: nothing is asked of it, but that it is a string or null. A place inside of it is right too.

    Raises:
        NotShown: Something is missing, or another.
    """
    see(answer.status == status, f"status {answer.status}, not {status}")
    content_type = answer.headers.get("content-type", "none")
    see(content_type.partition(";")[0] == "application/json", f"the content type is {content_type}")
    error = find(answer.json, "error")
    if not isinstance(error, dict):
        raise NotShown(f"no error object: {answer.body[:60]!r}")
    missing = sorted(KEYS - set(error))
    see(not missing, f"the error object has no {', '.join(missing)}")
    see(isinstance(error["message"], str) and error["message"], "the message is no text")
    see(error["type"] == kind, f"the type is {error['type']!r}, not {kind!r}")
    for name in ("param", "code"):
        see(error[name] is None or isinstance(error[name], str), f"{name} is {error[name]!r}")
    if param is not None:
        see(_is_at(error["param"], param), f"param is {error['param']!r}, not {param!r}")
    if code is not None:
        see(error["code"] == code, f"code is {error['code']!r}, not {code!r}")
    see(answer.headers.get("x-request-id"), "there is no x-request-id")


def _is_at(given: str | None, wanted: str) -> bool:
    """The place itself, or one inside of it."""
    return given is not None and re.match(rf"{re.escape(wanted)}($|[.\[])", given) is not None


def check_header(answer: Answer, name: str, pattern: str) -> None:
    """Raises:
    NotShown: It is missing, or the regular expression does not match.
    """
    value = answer.headers.get(name)
    if value is None:
        raise NotShown(f"there is no header {name}")
    see(re.search(pattern, value, re.IGNORECASE), f"{name} is {value[:60]!r}")
