"""Compares answers with expectations: error objects, and values at paths of an answer.

Pure; used for the declared behaviors of the catalogue and by the checks in code.
"""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec

from tests.conformance.server import MESSAGES, Answer, NotShown, require

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


class Expectation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the answer's JSON must have at a path such as `choices.0.message.role`; criteria that are not set do not apply.

    Attributes:
        equals: As JSON text.
        same_as: Another path that must have the same value.
        count: Number of items of an array.
    """

    at: str
    equals: str | None = None
    kind: str | None = None
    matches: str | None = None
    same_as: str | None = None
    count: int | None = None
    minimum: float | None = None


def check(answer: Answer, wanted: Expectation) -> None:
    """Raises:
    NotShown: It is not there.
    """
    value = find(answer.json, wanted.at)
    shown = "nothing" if value is _ABSENT else json.dumps(value)[:60]
    if wanted.equals is not None:
        require(_same(value, json.loads(wanted.equals)), f"{wanted.at} is {shown}, not {wanted.equals}")
    if wanted.kind is not None:
        require(_KINDS[wanted.kind](value), f"{wanted.at} is {shown}, not {wanted.kind}")
    if wanted.matches is not None:
        require(isinstance(value, str) and re.search(wanted.matches, value), f"{wanted.at} is {shown}")
    if wanted.same_as is not None:
        other = find(answer.json, wanted.same_as)
        require(value is not _ABSENT and value == other, f"{wanted.at} is {shown}, unlike {wanted.same_as}")
    if wanted.count is not None:
        require(isinstance(value, list) and len(value) == wanted.count, f"{wanted.at} is {shown}")
    if wanted.minimum is not None:
        require(_KINDS["number"](value) and value >= wanted.minimum, f"{wanted.at} is {shown}")


def find(value: Any, path: str) -> Any:
    """The value at a dotted path, or `_ABSENT`."""
    for name in path.split(".") if path else ():
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
    """Check that the answer is a complete error in OpenAI's format.

    Args:
        param: The parameter that the error must name, or a path inside it. None: any string or null.

    Raises:
        NotShown: Something is missing or different.
    """
    require(answer.status == status, f"status {answer.status}, not {status}")
    content_type = answer.headers.get("content-type", "none")
    require(content_type.partition(";")[0] == "application/json", f"the content type is {content_type}")
    error = find(answer.json, "error")
    if not isinstance(error, dict):
        raise NotShown(f"no error object: {answer.body[:60]!r}")
    missing = sorted(KEYS - set(error))
    require(not missing, f"the error object has no {', '.join(missing)}")
    require(isinstance(error["message"], str) and error["message"], "the message is not text")
    require(error["type"] == kind, f"the type is {error['type']!r}, not {kind!r}")
    for name in ("param", "code"):
        require(error[name] is None or isinstance(error[name], str), f"{name} is {error[name]!r}")
    if param is not None:
        require(_is_at(error["param"], param), f"param is {error['param']!r}, not {param!r}")
    if code is not None:
        require(error["code"] == code, f"code is {error['code']!r}, not {code!r}")
    require(answer.headers.get("x-request-id"), "there is no x-request-id")


def check_error_at(path: str, answer: Answer, status: int, **wanted: str | None) -> None:
    """Check that the answer is a complete error in the format of the path's protocol.

    Args:
        wanted: `param`, `code` and `kind` of `check_error`; Anthropic's errors have neither `param` nor `code`, and their message names
            the parameter.

    Raises:
        NotShown: Something is missing or different.
    """
    if not path.startswith(MESSAGES):
        check_error(answer, status, **{name: text for name, text in wanted.items() if text is not None})
        return
    require(answer.status == status, f"status {answer.status}, not {status}")
    content_type = answer.headers.get("content-type", "none")
    require(content_type.partition(";")[0] == "application/json", f"the content type is {content_type}")
    require(find(answer.json, "type") == "error", f"the type is {find(answer.json, 'type')!r}, not 'error'")
    error = find(answer.json, "error")
    if not isinstance(error, dict) or set(error) != {"type", "message"}:
        raise NotShown(f"no error object of type and message: {answer.body[:60]!r}")
    kind = wanted.get("kind") or "invalid_request_error"
    require(error["type"] == kind, f"the type is {error['type']!r}, not {kind!r}")
    require(isinstance(error["message"], str) and error["message"], "the message is not text")
    param = (wanted.get("param") or "").rpartition(".")[2]
    require(param in error["message"], f"the message does not name {param}: {error['message'][:60]!r}")
    require(find(answer.json, "request_id") is not _ABSENT, "there is no request_id")


def _is_at(given: str | None, wanted: str) -> bool:
    """Whether `given` is the path itself or inside it."""
    return given is not None and re.match(rf"{re.escape(wanted)}($|[.\[])", given) is not None


def check_header(answer: Answer, name: str, pattern: str) -> None:
    """Raises:
    NotShown: It is missing, or the regular expression does not match.
    """
    value = answer.headers.get(name)
    if value is None:
        raise NotShown(f"there is no header {name}")
    require(re.search(pattern, value, re.IGNORECASE), f"{name} is {value[:60]!r}")
