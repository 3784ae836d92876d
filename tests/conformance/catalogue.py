"""The catalogue: what has to be seen, read from `sections/*.toml`.

Three kinds of entries. `refused`: bad values of a parameter, each one a behaviour. `answered`: a request, and what its
answer has to have. `checked`: a function of `checks/`, with arguments. JSON is written as text, so that there can be null,
NaN and numbers as they go over the wire; an empty text leaves a field out.
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
from tests.conformance.server import CHAT, Server, see

SECTIONS = (
    "errors",
    "chat",
    "stream",
    "stops",
    "logprobs",
    "sampling",
    "legacy",
    "structured",
    "tools",
    "concurrency",
    "http",
)

_FOLDER = Path(__file__).parent / "sections"
_SHOWN = 48


class Behaviour(msgspec.Struct, frozen=True):
    """One of them; `check` raises `NotShown`."""

    id: str
    section: str
    sentence: str
    check: Callable[[Server], None]


class Refused(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Values of `param`, each answered with a 400 that names it; without `param` it may name anything.

    Attributes:
        field: What the values are of, where `param` is a place in it.
        fields: More of the request, by name.
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
    """A request, and what its answer has to have.

    Attributes:
        body: As it is, in place of `fields`.
        headers: Of the request.
        have: Headers of the answer: regular expressions.
        error: The answer is an error: all that belongs to one, and these of `param`, `code` and `kind`.
    """

    id: str
    sentence: str
    status: int = 200
    method: str = "POST"
    path: str = CHAT
    fields: dict[str, str] = {}
    body: str | None = None
    headers: dict[str, str] = {}
    have: dict[str, str] = {}
    see: list[judge.Seen] = []
    error: dict[str, str] | None = None


class Checked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A function `module.name` of `checks/`, called with the server and `given`."""

    id: str
    sentence: str
    by: str
    given: dict[str, Any] = {}
    needs_key: bool = False


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file."""

    refused: list[Refused] = []
    answered: list[Answered] = []
    checked: list[Checked] = []


def load(only: str = "", *, with_key: bool = False) -> list[Behaviour]:
    """All behaviours in order, or those that have `only` in their id.

    Args:
        with_key: Whether the server asks for keys, and one is known.
    """
    found: list[Behaviour] = []
    for name in SECTIONS:
        section = msgspec.convert(tomllib.loads((_FOLDER / f"{name}.toml").read_text()), Section)
        found += _behaviours(name, section, with_key=with_key)
    ids = [behaviour.id for behaviour in found]
    twice = {each for each in ids if ids.count(each) > 1}
    if twice:
        raise ValueError(f"in the catalogue twice: {', '.join(sorted(twice))}")
    return [behaviour for behaviour in found if only in behaviour.id]


def _behaviours(name: str, section: Section, *, with_key: bool) -> Iterator[Behaviour]:
    for refused in section.refused:
        for value in refused.values:
            yield _refusal(name, refused, value)
    for answered in section.answered:
        check = functools.partial(_check_answered, answered=answered)
        yield Behaviour(f"{name}.{answered.id}", name, answered.sentence, check)
    for checked in section.checked:
        if with_key or not checked.needs_key:
            module, _, function = checked.by.partition(".")
            found = getattr(importlib.import_module(f"tests.conformance.checks.{module}"), function)
            yield Behaviour(
                f"{name}.{checked.id}", name, checked.sentence, functools.partial(found, **checked.given)
            )


def _refusal(name: str, refused: Refused, value: str) -> Behaviour:
    """An id and a sentence are made of the data."""
    field = refused.field or refused.param or ""
    endpoint = "chat" if "chat" in refused.path else "legacy"
    shown = (value if len(value) <= _SHOWN else value[: _SHOWN - 1] + "…") or "nothing"
    beside = "".join(f",{k}={v}" for k, v in refused.fields.items() if len(v) <= _SHOWN)
    named = f" with param `{refused.param}`" if refused.param else ""
    why = f" ({refused.why})" if refused.why else ""
    return Behaviour(
        f"{name}.{endpoint}.{field}={shown}{beside}",
        name,
        f"`{field}: {shown}` is a {refused.status}{named}{why}",
        functools.partial(_check_refused, refused=refused, field=field, value=value),
    )


def body(server: Server, path: str, fields: dict[str, str]) -> bytes:
    """A request as it goes over the wire: the usual fields, and `fields` as they are written."""
    whole = {name: json.dumps(value) for name, value in server.fields(path).items()} | fields
    return ("{" + ", ".join(f'"{name}": {value}' for name, value in whole.items() if value) + "}").encode()


def _check_refused(server: Server, *, refused: Refused, field: str, value: str) -> None:
    asked = server.ask("POST", refused.path, body(server, refused.path, refused.fields | {field: value}))
    judge.check_error(asked, refused.status, param=refused.param, code=refused.code)


def _check_answered(server: Server, *, answered: Answered) -> None:
    path = answered.path.replace("{model}", server.model)
    sent = None
    if answered.body is not None:
        sent = answered.body.encode()
    elif answered.method == "POST":
        sent = body(server, path, answered.fields)
    answer = server.ask_once(answered.method, path, sent, answered.headers)
    if answered.error is not None:
        judge.check_error(answer, answered.status, **answered.error)
    see(
        answer.status == answered.status,
        f"status {answer.status}, not {answered.status}: {answer.body[:60]!r}",
    )
    for name, pattern in answered.have.items():
        judge.check_header(answer, name, pattern)
    for wanted in answered.see:
        judge.check(answer, msgspec.structs.replace(wanted, equals=_of_model(wanted.equals, server)))


def _of_model(text: str | None, server: Server) -> str | None:
    return json.dumps(server.model) if text == "{model}" else text
