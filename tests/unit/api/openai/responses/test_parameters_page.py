"""docs/parameters.md has a row for each field of a response request, and each row says what the parser does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from openai.types.responses.custom_tool_param import CustomToolParam
from openai.types.responses.function_tool_param import FunctionToolParam
from openai.types.responses.namespace_tool_param import NamespaceToolParam
from openai.types.responses.response_create_params import ResponseCreateParamsStreaming, StreamOptions
from openai.types.responses.response_includable import ResponseIncludable
from openai.types.responses.response_input_item_param import ResponseInputItemParam
from openai.types.responses.response_text_config_param import ResponseTextConfigParam
from openai.types.shared_params.reasoning import Reasoning

from api.openai.fields import body
from api.openai.responses import request as response_request
from api.openai.responses import text_format, tools
from api.openai.responses.history import builtin_items, conversation
from tests.unit.api.openai.responses.requests import messages, parse, refused

PAGE = Path(__file__).parents[5] / "docs" / "parameters.md"
DECISIONS = {"honored", "no effect", "ignored", "refused"}
FUNCTION = {"type": "function", "name": "f"}
CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}

HONORED_ITEMS: dict[str, dict[str, Any]] = {
    "message": {"role": "user", "content": "x"},
    "reasoning": {"content": [{"type": "reasoning_text", "text": "x"}]},
    "function_call": CALL,
    "function_call_output": {"call_id": "c", "output": "x"},
    "custom_tool_call": {"call_id": "c", "name": "f", "input": "x"},
    "custom_tool_call_output": {"call_id": "c", "output": "x"},
    "local_shell_call": {"call_id": "c", "action": {"command": ["ls"]}},
    "local_shell_call_output": {"id": "c", "output": "x"},
    "shell_call": {"call_id": "c", "action": {"commands": ["ls"]}},
    "shell_call_output": {"call_id": "c", "output": [{"stdout": "x"}]},
    "apply_patch_call": {"call_id": "c", "operation": {"type": "delete_file", "path": "x"}},
    "apply_patch_call_output": {"call_id": "c", "output": "x"},
    "code_interpreter_call": {"id": "c", "code": "1"},
    "mcp_call": {"id": "c", "name": "f", "arguments": "{}"},
}
"""One of each kind that becomes a message; references and additional tools have tests of their own."""


def section(heading: str) -> str:
    """The text below a heading."""
    _before, found, after = PAGE.read_text().partition(f"## {heading}\n")
    assert found
    return after.partition("\n## ")[0]


def rows(heading: str) -> dict[str, str]:
    """Decisions by field."""
    found = re.findall(r"^\| `([\w.]+)` \| ([a-z ]+) \|", section(heading), re.MULTILINE)
    assert len(found) == len(dict(found)), "a field has two rows"
    assert {decision for _name, decision in found} <= DECISIONS
    return dict(found)


FIELDS, NESTED, INCLUDE, TOOLS, ITEMS = (
    rows(heading)
    for heading in (
        "Responses",
        "Nested fields of responses",
        "Values of `include`",
        "Tools of responses",
        "Input items of responses",
    )
)
SHARED = set(re.findall(r"`(\w+)`", section("Responses").partition("first table: ")[2].partition(".\n")[0]))


def of(decision: str, decisions: dict[str, str]) -> list[str]:
    """The fields with a decision."""
    return [name for name, each in decisions.items() if each == decision]


def test_each_field_has_a_row() -> None:
    """Its own, or that of chats; each row is a field, or something that is ignored."""
    fields = set(response_request.ResponsesBody.__struct_fields__)
    assert fields - FIELDS.keys() == SHARED
    assert set(body.Body.__struct_fields__) & rows("Chats and legacy completions").keys() >= SHARED
    assert {FIELDS[name] for name in FIELDS.keys() - fields} == {"ignored"}


@pytest.mark.parametrize("name", of("ignored", FIELDS))
def test_ignored_fields_are_named(name: str) -> None:
    """Whatever their value is."""
    assert parse(**{name: {"a": 1}}).ignored == [name]


def test_refused_fields() -> None:
    """Exactly those that the parser refuses, by name."""
    assert set(of("refused", FIELDS)) == response_request.NEUTRAL.keys()
    for name in response_request.NEUTRAL:
        assert refused(**{name: 2}).param == name


def test_values_of_ineffective_fields() -> None:
    """The parser has no table of fields without an effect that chats do not have."""
    assert response_request.INEFFECTIVE.keys() <= SHARED


@pytest.mark.parametrize("name", of("no effect", FIELDS))
def test_fields_with_no_effect_are_not_named(name: str) -> None:
    """There is nothing that they could change."""
    value: Any = {"max_tool_calls": 1, "prompt_cache_options": {"a": 1}}.get(name, "x")
    assert parse(**{name: value}).ignored == []


def test_each_nested_field_has_a_row() -> None:
    """Each row is a field, or something that is ignored."""
    structs = {
        "text": text_format.TextConfig,
        "text.format": text_format.TextFormat,
        "reasoning": response_request.Reasoning,
        "stream_options": body.StreamOptions,
        "tool_choice": tools.ToolChoice,
    }
    fields = {f"{path}.{name}" for path, kind in structs.items() for name in kind.__struct_fields__}
    assert fields - NESTED.keys() == set()
    assert {NESTED[name] for name in NESTED.keys() - fields} == {"ignored"}


@pytest.mark.parametrize("name", of("ignored", NESTED))
def test_ignored_nested_fields_are_named(name: str) -> None:
    """With their path."""
    value: Any = {"text.verbosity": "high", "stream_options.continuous_usage_stats": True}.get(name, "x")
    parent, _, last = name.rpartition(".")
    assert parse(stream=True, **{parent: {last: value}}).ignored == [name]


@pytest.mark.parametrize("name", of("no effect", NESTED))
def test_nested_fields_with_no_effect_are_not_named(name: str) -> None:
    """There is nothing that they could change."""
    if name.startswith("stream_options."):
        fields: dict[str, Any] = {"stream": True, "stream_options": {name.partition(".")[2]: True}}
    else:
        value = True if name.endswith("strict") else "x"
        fields = {
            "text": {"format": {"type": "json_schema", "schema": {}} | {name.rpartition(".")[2]: value}}
        }
    assert parse(**fields).ignored == []


def test_values_of_include() -> None:
    """Those of the page that are honored are those of the parser; the others are named."""
    assert set(of("honored", INCLUDE)) == {response_request.LOGPROBS, response_request.THOUGHTS}
    for name, decision in INCLUDE.items():
        assert parse(include=[name]).ignored == (["include[0]"] if decision == "ignored" else [])


def test_each_field_of_a_tool_has_a_row() -> None:
    """Those of functions, custom tools and namespaces; `function` is that of chats."""
    kinds = (tools.FunctionTool, tools.CustomTool, tools.NamespaceTool)
    assert TOOLS.keys() == {"function", *(name for kind in kinds for name in kind.__struct_encode_fields__)}
    chat_tool = {"type": "function", "function": {"name": "f"}}
    assert parse(tools=[chat_tool]).tool_use == parse(tools=[FUNCTION]).tool_use


@pytest.mark.parametrize("name", of("ignored", TOOLS))
def test_ignored_fields_of_tools_are_named(name: str) -> None:
    """Also of a tool in a namespace, and of a custom one."""
    function = FUNCTION | {name: ["programmatic"]}
    namespace = {"type": "namespace", "name": "n", "tools": [function]}
    custom = function | {"type": "custom", "name": "g"}
    request = parse(tools=[function, namespace, custom])
    assert request.ignored == [f"tools[0].{name}", f"tools[1].tools[0].{name}", f"tools[2].{name}"]


def test_fields_of_tools_that_ask_for_nothing() -> None:
    """Values that mean what is done anyway are not named."""
    neutral = {"defer_loading": False, "async": False, "allowed_callers": ["direct", "programmatic"]}
    assert parse(tools=[FUNCTION | neutral | {"output_schema": None}]).ignored == []


def test_each_kind_of_item_has_a_row() -> None:
    """The ignored ones are those of the table of the parser."""
    assert set(of("ignored", ITEMS)) == builtin_items.SKIPPED
    assert set(of("honored", ITEMS)) == {*HONORED_ITEMS, "item_reference", "additional_tools"}
    assert ITEMS.keys() >= conversation._KINDS


@pytest.mark.parametrize("kind", of("ignored", ITEMS))
def test_ignored_items_are_named(kind: str) -> None:
    """With what such items have."""
    item = {"type": kind, "id": "i", "call_id": "c", "action": {"query": "x"}, "output": "x"}
    hi = {"role": "user", "content": "hi"}
    assert parse(input=[hi, item]).ignored == ["input[1]"]
    assert messages(hi, item) == messages(hi)


@pytest.mark.parametrize("kind", HONORED_ITEMS)
def test_honored_items_become_messages(kind: str) -> None:
    """Nothing of them is named."""
    items = [CALL, {"type": kind, **HONORED_ITEMS[kind], "status": "completed"}]
    assert parse(input=items).ignored == []
    assert messages(*items) != messages(CALL)


def test_a_file_search_with_results_is_shown() -> None:
    """As its row says: a call and its result."""
    item = {"type": "file_search_call", "id": "s", "queries": ["q"], "results": [{"text": "x"}]}
    assert parse(input=[item]).ignored == []
    assert [message["role"] for message in messages(item)] == ["assistant", "tool"]


def test_items_that_are_not_messages() -> None:
    """A reference is looked up; additional tools can be called."""
    assert not parse(input=[{"type": "item_reference", "id": "x"}]).is_complete  # type: ignore[attr-defined]
    more = {"type": "additional_tools", "tools": [FUNCTION]}
    request = parse(input=[{"role": "user", "content": "hi"}, more])
    assert (request.ignored, request.tool_use) == ([], parse(tools=[FUNCTION]).tool_use)


def _kinds(item: Any) -> set[str]:
    """The values of an item's `type`."""
    found = [get_type_hints(item)["type"]]
    kinds = set()
    for hint in found:
        if get_origin(hint) is Literal:
            kinds |= set(get_args(hint))
        else:
            found += [each for each in get_args(hint) if each is not type(None)]
    return kinds


def test_everything_that_the_sdk_sends_has_a_row() -> None:
    """The types of OpenAI's SDK name no field, value or item that the page lacks."""
    assert set(get_type_hints(ResponseCreateParamsStreaming)) - FIELDS.keys() == SHARED & set(
        get_type_hints(ResponseCreateParamsStreaming)
    )
    nested: dict[str, Any] = {
        "text": ResponseTextConfigParam,
        "reasoning": Reasoning,
        "stream_options": StreamOptions,
    }
    for path, kind in nested.items():
        assert {f"{path}.{name}" for name in get_type_hints(kind)} <= NESTED.keys()
    for tool in (FunctionToolParam, CustomToolParam, NamespaceToolParam):
        assert set(get_type_hints(tool)) <= TOOLS.keys()
    assert set(get_args(ResponseIncludable)) == INCLUDE.keys()
    assert get_origin(ResponseInputItemParam) is Union
    sent = set().union(*map(_kinds, get_args(ResponseInputItemParam)))
    assert sent <= ITEMS.keys()
