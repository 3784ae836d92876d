"""docs/parameters.md has a row for each field of a message's request, and each row says what the parser does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from api.anthropic.messages.request import MessagesBody
from tests.unit.api.anthropic.test_request import HI, refusal, request

PAGE = Path(__file__).parents[4] / "docs" / "parameters.md"
TEXT = {"type": "text", "text": "hi"}
BLOCKS: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("user", TEXT),
    "tool_use": ("assistant", {"id": "t", "name": "f", "input": {}}),
    "tool_result": ("user", {"tool_use_id": "t", "content": "x"}),
    "thinking": ("assistant", {"thinking": "hm", "signature": "s"}),
    "document": ("user", {"source": {"type": "text", "data": "x"}}),
    "search_result": ("user", {"source": "s", "title": "t", "content": [TEXT]}),
    "tool_reference": ("user", {"tool_name": "f"}),
    "image": ("user", {"source": {"type": "url", "url": "x"}}),
    "redacted_thinking": ("assistant", {"data": "x"}),
    "server_tool_use": ("assistant", {"id": "s", "name": "web_search", "input": {}}),
    "mcp_tool_use": ("assistant", {"id": "s", "name": "f", "input": {}}),
    "container_upload": ("user", {}),
    "compaction": ("assistant", {"content": "x"}),
    "tool_addition": ("user", {}),
    "tool_removal": ("user", {}),
    "mcp_tool_listing": ("user", {}),
    "fallback": ("assistant", {}),
}


def rows(heading: str) -> dict[str, str]:
    """Decisions by field."""
    section = PAGE.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| `(\w+)` \| ([a-z ]+) \|", section, re.MULTILINE))


FIELDS = rows("Anthropic's messages")


def test_each_field_has_a_row() -> None:
    """And each row is a field, or something that is ignored."""
    fields = set(MessagesBody.__struct_fields__)
    assert fields - FIELDS.keys() == set()
    assert {FIELDS[name] for name in FIELDS.keys() - fields} == {"ignored"}


@pytest.mark.parametrize("name", [name for name, decision in FIELDS.items() if decision == "ignored"])
def test_ignored_fields_are_named(name: str) -> None:
    """Whatever their value is."""
    assert request(**{name: {"a": 1}}).ignored == [name]


@pytest.mark.parametrize("name", [name for name, decision in FIELDS.items() if decision == "refused"])
def test_refused_fields_are_refused(name: str) -> None:
    """By name."""
    value: Any = [{"url": "x"}] if name == "mcp_servers" else {"type": "x"}
    assert refusal(**{name: value}).param == name


def test_each_block_has_a_row() -> None:
    """Each is served, skipped and named, or refused, as its row says."""
    decisions = rows("Anthropic's content blocks")
    assert decisions.keys() == BLOCKS.keys()
    for kind, (role, fields) in BLOCKS.items():
        messages = [*HI, {"role": role, "content": [fields | {"type": kind}, TEXT]}, *HI]
        if decisions[kind] == "refused":
            assert refusal(messages=messages).param == "messages[1].content[0].type"
        else:
            named = request(messages=messages).ignored
            assert named == (["messages[1].content[0]"] if decisions[kind] == "ignored" else [])
