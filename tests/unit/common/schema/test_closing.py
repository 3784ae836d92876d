"""Objects that name their properties are closed, and never so that named properties become impossible."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.protocol import ToolUse
from common.schema import grammar, json_schema, limits
from tests.unit.common.schema.matching import accepts

BASE = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
MORE = {"properties": {"b": {"properties": {"x": True}}}}


@pytest.mark.parametrize(
    ("schema", "inside", "outside"),
    [
        ({"type": "object", "properties": {}}, "{}", '{"a":1}'),
        ({"properties": {"a": True}}, '{"a":1}', '{"a":1,"b":1}'),
        ({"properties": {"a": {"properties": {"x": True}}}}, '{"a":{"x":1}}', '{"a":{"y":1}}'),
        ({"type": "array", "items": BASE}, '[{"a":1}]', '[{"a":1,"b":1}]'),
        ({"properties": {"a": True}, "required": ["z"]}, '{"a":1,"z":[1]}', '{"z":1,"y":1}'),
        ({"properties": {"a": True}, "patternProperties": {"^x": True}}, '{"a":1,"x1":1}', '{"y":1}'),
        ({"properties": {"a": True}, "unevaluatedProperties": False}, '{"a":1}', '{"b":1}'),
        ({"anyOf": [BASE, {"type": "null"}]}, '{"a":1}', '{"a":1,"b":1}'),
        ({"allOf": [BASE], "description": "d"}, '{"a":1}', '{"a":1,"b":1}'),
        (
            {"$ref": "#/$defs/n", "$defs": {"n": {"properties": {"n": {"$ref": "#/$defs/n"}}}}},
            '{"n":{}}',
            '{"n":{"m":1}}',
        ),
        ({"allOf": [BASE, MORE]}, '{"a":1,"b":{"x":1}}', '{"a":1,"c":1}'),
        ({"allOf": [BASE, MORE]}, '{"a":1,"b":{}}', '{"a":1,"b":{"y":1}}'),
        ({"allOf": [BASE, MORE], "unevaluatedProperties": False}, '{"a":1,"b":{}}', '{"a":1,"c":1}'),
        ({"$ref": "#/$defs/b", "$defs": {"b": BASE}, **MORE}, '{"a":1,"b":{}}', '{"a":1,"c":1}'),
        (
            {"properties": {"p": True, "q": True}, "anyOf": [{"required": ["p"]}, {"required": ["q"]}]},
            '{"q":1}',
            '{"q":1,"r":1}',
        ),
        (
            {"properties": {"p": True}, "anyOf": [{"properties": {"q": True}}, {"properties": {"r": True}}]},
            '{"p":1,"r":1}',
            '{"p":1,"s":1}',
        ),
    ],
)
def test_closed(schema: dict[str, Any], inside: str, outside: str) -> None:
    """Named properties are accepted, also if several subschemas name them; others are not."""
    text = grammar.for_json_schema(schema)
    assert grammar.check(text) is None
    assert accepts(text, inside)
    assert not accepts(text, outside)


@pytest.mark.parametrize(
    ("schema", "answer"),
    [
        ({"type": "object"}, '{"z":1}'),
        ({"properties": {"a": True}, "additionalProperties": True}, '{"z":1}'),
        ({"properties": {"a": True}, "additionalProperties": {"type": "integer"}}, '{"z":1}'),
        ({"properties": {"a": True}, "unevaluatedProperties": True}, '{"z":1}'),
        ({"properties": {"a": True}, "required": ["a"], "minProperties": 2}, '{"a":1,"z":1}'),
        ({"allOf": [{**BASE, "additionalProperties": True}, MORE]}, '{"a":1,"z":1}'),
        ({**BASE, "anyOf": [{"type": "object"}, MORE]}, '{"a":1,"z":1}'),
        (
            {
                "allOf": [
                    {"properties": {"a": {"properties": {"x": True}}}},
                    {"properties": {"a": {"properties": {"y": True}}}},
                ]
            },
            '{"a":{"x":1,"y":1}}',
        ),
        (
            {
                "allOf": [
                    {"patternProperties": {"^a": {"properties": {"x": True}}}},
                    {"properties": {"a": {"properties": {"y": True}}}},
                ]
            },
            '{"a":{"x":1,"y":1}}',
        ),
        (
            {"allOf": [{"items": {"properties": {"x": True}}}, {"items": {"properties": {"y": True}}}]},
            '[{"x":1,"y":1}]',
        ),
    ],
)
def test_open(schema: dict[str, Any], answer: str) -> None:
    """An object that says so, or that could not match otherwise, stays open."""
    text = grammar.for_json_schema(schema)
    assert grammar.check(text) is None
    assert accepts(text, answer)


def test_an_impossible_object_is_refused() -> None:
    """A required property that no subschema names is forbidden here: no answer could validate."""
    schema = {"$defs": {"a": BASE}, "$ref": "#/$defs/a", "required": ["z"], "unevaluatedProperties": False}
    assert "nsatisfiable" in str(grammar.check(grammar.for_json_schema(schema)))


def test_a_subschema_that_is_used_alone_and_with_others_stays_open() -> None:
    """Closing it would make the properties impossible that others add to it."""
    schema = {
        "$defs": {"b": BASE},
        "properties": {"alone": {"$ref": "#/$defs/b"}, "more": {"allOf": [{"$ref": "#/$defs/b"}, MORE]}},
    }
    text = grammar.for_json_schema(schema)
    assert accepts(text, '{"alone":{"a":1},"more":{"a":1,"b":{}}}')
    assert not accepts(text, '{"alone":{"a":1},"more":{"a":1,"c":{}}}')


@pytest.mark.parametrize("function", [{}, {"parameters": {"type": "object", "properties": {}}}])
def test_a_function_without_parameters(function: dict[str, Any]) -> None:
    """A forced call of a function that declares none has no arguments."""
    tool = {"type": "function", "function": {"name": "now", **function}}
    text = grammar.for_tool_calls(ToolUse(tools=[tool], is_required=True))
    assert accepts(text, '<tool_call>{"name":"now","arguments":{}}</tool_call>')
    assert not accepts(text, '<tool_call>{"name":"now","arguments":{"a":1}}</tool_call>')


def test_a_schema_at_the_limits_stays_as_it_is() -> None:
    """A schema that would be too large with its objects closed is accepted with open ones."""
    names = {f"p{i}": True for i in range(1500)}
    schema = {"allOf": [BASE, {"properties": names}]}
    assert limits.size_refusal(schema) is None
    assert grammar.check(grammar.for_json_schema(schema)) is None


NAMES = st.sampled_from("abcd")
LEAVES = st.sampled_from([True, {"type": "integer"}, {"type": "string"}, {"const": 1}])


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Schemas of objects that name some properties."""
    named = st.dictionaries(NAMES, inner, max_size=3)
    required = st.lists(NAMES, max_size=2, unique=True)
    return st.builds(lambda p, r: {"type": "object", "properties": p, "required": r}, named, required)


def combined(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Schemas that combine others."""
    listed = st.lists(inner, min_size=1, max_size=3)
    keyword = st.sampled_from(["allOf", "anyOf"])
    alone = st.builds(lambda key, options: {key: options}, keyword, listed)
    beside = st.builds(
        lambda own, key, options: {**own, key: options} if isinstance(own, dict) else own,
        inner,
        keyword,
        listed,
    )
    reference = st.builds(lambda own: {**own, "$ref": "#/$defs/a"} if isinstance(own, dict) else own, inner)
    return st.one_of(objects(inner), alone, beside, reference, st.just({"$ref": "#/$defs/a"}))


SCHEMAS = st.recursive(LEAVES, combined, max_leaves=8)
VALUES = st.recursive(
    st.sampled_from([1, "x"]), lambda inner: st.dictionaries(NAMES, inner, max_size=4), max_leaves=8
)


@given(
    st.builds(
        lambda a, root: {"$defs": {"a": a}, **root},
        objects(LEAVES),
        SCHEMAS.filter(lambda s: isinstance(s, dict)),
    ),
    VALUES,
)
def test_stricter_but_never_impossible(schema: dict[str, Any], value: Any) -> None:
    """What the closed schema accepts, the client's accepts; a flat value with named properties only is not lost.

    Only an alternative that does not name a property itself may lose it.
    """
    original = jsonschema.Draft202012Validator(schema)
    closed = json_schema.rewrite(schema)
    is_allowed = jsonschema.Draft202012Validator(closed).is_valid(value)
    assert not is_allowed or original.is_valid(value)
    if (
        original.is_valid(value)
        and "anyOf" not in repr(schema)
        and is_named(value, schema, schema["$defs"]["a"])
    ):
        assert is_allowed, closed


def is_named(value: Any, schema: Any, definition: Any) -> bool:
    """Whether each object in a value has only properties that a schema without unions names."""
    if not isinstance(value, dict):
        return True
    joined, pending = [], [schema]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            joined.append(node)
            pending += [*node.get("allOf", []), *([definition] if "$ref" in node else [])]
    for name, inner in value.items():
        found = [node["properties"][name] for node in joined if name in node.get("properties", {})]
        if not (found or any(name in node.get("required", []) for node in joined)):
            return False
        if not is_named(inner, {"allOf": found} if found else True, definition) and found:
            return False
    return True
