"""docs/parameters.md has a row for each field of a request, and each row says what the parsers do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from api.openai.chat import messages, tools
from api.openai.chat import request as chat_request
from api.openai.completions import request as completion_request
from api.openai.fields import response_format
from api.openai.fields.functions import FunctionDefinition
from common.errors import RequestError

PAGE = Path(__file__).parents[4] / "docs" / "parameters.md"
DECISIONS = {"honored", "no effect", "ignored", "refused"}
HI = [{"role": "user", "content": "hi"}]

_ROW = re.compile(r"^\| `(\w+)` \| ([a-z ]+) \|", re.MULTILINE)


def _sections() -> dict[str, dict[str, str]]:
    """Decisions by field, by heading."""
    parts = re.split(r"^## (.*)$", PAGE.read_text(), flags=re.MULTILINE)
    rows = {heading: _ROW.findall(text) for heading, text in zip(parts[1::2], parts[2::2], strict=True)}
    for heading, found in rows.items():
        assert len(found) == len({name for name, _ in found}), f"a field has two rows in {heading}"
    return {heading: dict(found) for heading, found in rows.items()}


SECTIONS = _sections()
BOTH, CHATS, LEGACY = (
    SECTIONS[name] for name in ("Chats and legacy completions", "Chats", "Legacy completions")
)


def parsed(module: Any, name: str, value: Any) -> list[str]:
    """The ignored parameters of a request with one more field."""
    body = {"messages": HI} if module is chat_request else {"prompt": "hi"}
    ignored: list[str] = module.parse(json.dumps(body | {name: value}).encode()).ignored
    return ignored


@pytest.mark.parametrize(
    ("body", "rows"),
    [
        (chat_request.ChatBody, BOTH | CHATS),
        (completion_request.CompletionBody, BOTH | LEGACY),
        (messages.Message, SECTIONS["Messages"]),
    ],
)
def test_each_field_has_a_row(body: Any, rows: dict[str, str]) -> None:
    """And each row is a field, or something that is ignored."""
    fields = set(body.__struct_fields__)
    assert fields - rows.keys() == set()
    assert {rows[name] for name in rows.keys() - fields} <= {"ignored"}
    assert set(rows.values()) <= DECISIONS


def test_each_field_of_a_tool_has_a_row() -> None:
    """Those of a tool and of the function in it."""
    fields = {*tools.Tool.__struct_fields__, *FunctionDefinition.__struct_fields__}
    assert set(SECTIONS["Tools"]) == fields


def _unknown() -> list[Any]:
    rows = [
        (chat_request, name) for name in (BOTH | CHATS).keys() - set(chat_request.ChatBody.__struct_fields__)
    ]
    fields = completion_request.CompletionBody.__struct_fields__
    return sorted([*rows, *((completion_request, name) for name in BOTH.keys() - set(fields))], key=str)


@pytest.mark.parametrize(("module", "name"), _unknown())
def test_fields_of_other_servers_are_ignored_and_named(module: Any, name: str) -> None:
    """Whatever their value is."""
    assert parsed(module, name, {"a": [1]}) == [name]


@pytest.mark.parametrize("name", sorted(chat_request.INEFFECTIVE))
def test_fields_without_an_effect_are_ignored_and_named(name: str) -> None:
    """The table of the parser and the page agree."""
    assert (BOTH | CHATS)[name] == "ignored"
    assert parsed(chat_request, name, "other") == [name]


def test_ignored_fields_are_those_of_the_table() -> None:
    """No other field of the types is described as ignored."""
    for module, body, rows in (
        (chat_request, chat_request.ChatBody, BOTH | CHATS),
        (completion_request, completion_request.CompletionBody, BOTH | LEGACY),
    ):
        described = {name for name in body.__struct_fields__ if rows[name] == "ignored"}
        assert described == set(module.INEFFECTIVE)


@pytest.mark.parametrize("name", sorted({*chat_request.NEUTRAL, *response_format.UNSUPPORTED}))
def test_refused_fields_are_refused(name: str) -> None:
    """By name."""
    assert (BOTH | CHATS)[name] == "refused"
    with pytest.raises(RequestError) as raised:
        parsed(chat_request, name, ["other"])
    assert raised.value.param == name


def test_other_fields_are_not_described_as_refused() -> None:
    """The page refuses no more than the parser."""
    refused = {name for name, decision in (BOTH | CHATS).items() if decision == "refused"}
    assert refused == {*chat_request.NEUTRAL, *response_format.UNSUPPORTED}


@pytest.mark.parametrize("name", [name for name, decision in CHATS.items() if decision == "no effect"])
def test_fields_with_no_effect_are_not_named(name: str) -> None:
    """They are part of the protocol, and there is nothing that they could change."""
    assert parsed(chat_request, name, "x" if "options" not in name and name != "metadata" else {"a": 1}) == []
