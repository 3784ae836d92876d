"""The catalogue of behaviors, loaded from `sections/`.

Three kinds of entries. `refused`: invalid values of a parameter, one behavior each. `answered`: a request and what its answer
must contain. `checked`: a function of `checks/` with arguments. JSON is written as text, so that null, NaN and numbers are sent
exactly as written; an empty string omits the field.
"""

from __future__ import annotations

import functools
import importlib
import json
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from tests.conformance import judge
from tests.conformance.server import CHAT, MESSAGES, RESPONSES, Server, require

_FILES = (
    "errors",
    "chat",
    "stream",
    "stops",
    "logprobs",
    "sampling",
    "legacy",
    "structured",
    "tools",
    "responses",
    "responses_calls",
    "messages",
    "server/resume",
    "clients",
    "server/concurrency",
    "server/http",
)
SECTIONS = tuple(name.rpartition("/")[2] for name in _FILES)
"""In the order of the report."""

_ENDPOINTS = {CHAT: "chat", RESPONSES: "responses", MESSAGES: "messages"}
_FOLDER = Path(__file__).parent / "sections"
_SHOWN = 48


class Behavior(msgspec.Struct, frozen=True):
    """One behavior; `check` raises `NotShown` if the server does not have it."""

    id: str
    section: str
    sentence: str
    check: Callable[[Server], None]


class Refused(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Values of `param`, each refused with a 400 that names it; without `param` it may name anything.

    Attributes:
        field: The field that has the value, if `param` is a path inside it.
        fields: Other fields of the request, by name.
    """

    values: list[str]
    param: str | None = None
    field: str | None = None
    path: str = CHAT
    fields: dict[str, str] = {}
    code: str | None = None
    status: int = 400
    why: str = ""


class Answered(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A request and what its answer must contain.

    Attributes:
        body: The raw body, instead of `fields`.
        headers: Request headers.
        expect_headers: Regular expressions that response headers must match.
        error: The answer must be a complete error with these of `param`, `code` and `kind`.
    """

    id: str
    sentence: str
    status: int = 200
    method: str = "POST"
    path: str = CHAT
    fields: dict[str, str] = {}
    body: str | None = None
    headers: dict[str, str] = {}
    expect_headers: dict[str, str] = {}
    expect: list[judge.Expectation] = []
    error: dict[str, str] | None = None


class Checked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A function `module.name` below `checks/`, called with the server and the arguments `given`."""

    id: str
    sentence: str
    by: str
    given: dict[str, Any] = {}
    needs_key: bool = False


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One TOML file."""

    refused: list[Refused] = []
    answered: list[Answered] = []
    checked: list[Checked] = []


def load(only: str = "", *, with_key: bool = False) -> list[Behavior]:
    """All behaviors in order, or those whose id contains `only`.

    Args:
        with_key: Whether the server requires API keys and the caller has one.
    """
    found: list[Behavior] = []
    for name, file in zip(SECTIONS, _FILES, strict=True):
        section = msgspec.convert(tomllib.loads((_FOLDER / f"{file}.toml").read_text()), Section)
        found += _behaviors(name, section, with_key=with_key)
    ids = [behavior.id for behavior in found]
    twice = {each for each in ids if ids.count(each) > 1}
    if twice:
        raise ValueError(f"in the catalogue twice: {', '.join(sorted(twice))}")
    return [behavior for behavior in found if only in behavior.id]


def _behaviors(name: str, section: Section, *, with_key: bool) -> Iterator[Behavior]:
    for refused in section.refused:
        for value in refused.values:
            yield _refusal(name, refused, value)
    for answered in section.answered:
        check = functools.partial(_check_answered, answered=answered)
        yield Behavior(f"{name}.{answered.id}", name, answered.sentence, check)
    for checked in section.checked:
        if with_key or not checked.needs_key:
            module, _, function = checked.by.rpartition(".")
            found = getattr(importlib.import_module(f"tests.conformance.checks.{module}"), function)
            yield Behavior(
                f"{name}.{checked.id}", name, checked.sentence, functools.partial(found, **checked.given)
            )


def _refusal(name: str, refused: Refused, value: str) -> Behavior:
    """The behavior that a value is refused; its id and sentence are derived from the data."""
    field = refused.field or refused.param or ""
    endpoint = _ENDPOINTS.get(refused.path, "legacy")
    shown = (value if len(value) <= _SHOWN else value[: _SHOWN - 1] + "…") or "nothing"
    beside = "".join(f",{k}={v}" for k, v in refused.fields.items() if len(v) <= _SHOWN)
    named = f" with param `{refused.param}`" if refused.param else ""
    why = f" ({refused.why})" if refused.why else ""
    return Behavior(
        f"{name}.{endpoint}.{field}={shown}{beside}",
        name,
        f"`{field}: {shown}` is a {refused.status}{named}{why}",
        functools.partial(_check_refused, refused=refused, field=field, value=value),
    )


def body(server: Server, path: str, fields: dict[str, str]) -> bytes:
    """The request body: the default fields, and `fields` exactly as written."""
    whole = {name: json.dumps(value) for name, value in server.fields(path).items()} | fields
    return ("{" + ", ".join(f'"{name}": {value}' for name, value in whole.items() if value) + "}").encode()


def _check_refused(server: Server, *, refused: Refused, field: str, value: str) -> None:
    asked = server.ask("POST", refused.path, body(server, refused.path, refused.fields | {field: value}))
    judge.check_error_at(refused.path, asked, refused.status, param=refused.param, code=refused.code)


def _check_answered(server: Server, *, answered: Answered) -> None:
    path = answered.path.replace("{model}", server.model)
    sent = None
    if answered.body is not None:
        sent = answered.body.encode()
    elif answered.method == "POST":
        sent = body(server, path, answered.fields)
    answer = server.ask_once(answered.method, path, sent, answered.headers)
    if answered.error is not None:
        judge.check_error_at(path, answer, answered.status, **answered.error)
    require(
        answer.status == answered.status,
        f"status {answer.status}, not {answered.status}: {answer.body[:60]!r}",
    )
    for name, pattern in answered.expect_headers.items():
        judge.check_header(answer, name, pattern)
    for wanted in answered.expect:
        judge.check(answer, msgspec.structs.replace(wanted, equals=_of_model(wanted.equals, server)))


def _of_model(text: str | None, server: Server) -> str | None:
    return json.dumps(server.model) if text == "{model}" else text
