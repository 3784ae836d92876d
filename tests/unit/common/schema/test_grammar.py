"""Grammars: what they accept, which are refused before anything is queued, and the messages for clients."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import msgspec
import pytest

from common.schema import grammar, json_schema
from common.schema import limits as schema_limits
from tests.unit.common.schema.matching import accepts

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("answer", ["{}", '{"a":1}', '{"a": [1, {"b": null}], "c": "d\\n"}', '{"é": "ü"}'])
def test_json_object(answer: str) -> None:
    """Any object, compact or with a space after commas and colons."""
    assert accepts(grammar.for_json_object(), answer)


@pytest.mark.parametrize(
    "answer", ["[]", "1", '{"a":  1}', '{ "a":1}', '{"a":1}\n', '{"a":1,}', '{"a\n":1}', "{"]
)
def test_json_object_accepts_nothing_else(answer: str) -> None:
    """No other value, and no unbounded white space."""
    assert not accepts(grammar.for_json_object(), answer)


@pytest.mark.parametrize(
    ("schema", "answer", "matches"),
    [
        (None, '{"a":1}', True),
        (True, "1", False),
        ({"properties": {"a": {"type": "integer"}}, "required": ["a"]}, '{"a":1}', True),
        ({"properties": {"a": {"type": "integer"}}, "required": ["a"]}, '{"a":"b"}', False),
        ({"properties": {"a": {"type": "integer"}}}, "1", False),
        ({"anyOf": [CITY]}, '{"city":"Bonn"}', True),
    ],
)
def test_json_object_with_a_schema(schema: Any, answer: str, matches: bool) -> None:
    """A schema next to `json_object` is enforced; one without a type accepts objects only."""
    assert accepts(grammar.for_json_object(schema), answer) == matches


def test_keys_are_in_the_order_of_the_schema() -> None:
    """As with OpenAI, the properties of an answer have the schema's order."""
    schema = {
        "type": "object",
        "properties": {"b": {"type": "integer"}, "a": {"type": "integer"}},
        "required": ["b", "a"],
    }
    text = grammar.for_json_schema(schema)
    assert accepts(text, '{"b":1,"a":2}')
    assert not accepts(text, '{"a":2,"b":1}')
    assert not accepts(text, '{"b":1,"a":2,"more":[]}')


def test_a_schema_cannot_change_the_options() -> None:
    """llguidance reads its options from a key of the schema; a client's are removed."""
    text = grammar.for_json_schema(
        {"type": "object", "x-guidance": {"whitespace_flexible": True, "lenient": True}}
    )
    assert not accepts(text, "{   }")


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"enum": []}, "no value of finite length"),
        (False, "no value of finite length"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "incompatible types"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "'a' is unsatisfiable"),
        ({"$ref": "https://example.com/schema"}, "https://example.com/schema"),
        ({"$ref": "#/$defs/missing"}, "#/$defs/missing"),
        ({"$ref": "#"}, "no value of finite length"),
        (
            {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
            "no value of finite length",
        ),
        ({"type": "array", "minItems": 1, "items": {"$ref": "#"}}, "no value of finite length"),
        ({"properties": {"a": {"$id": "https://example.com/a"}}}, "$id"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "string"}}, "not"),
        ({"if": {}, "then": {}}, "if"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "use anyOf"),
        ({"oneOf": 5}, "oneOf"),
        ({"type": "blah"}, "blah"),
        ({"type": "string", "pattern": "^(?=a)b"}, "look-around"),
        ({"type": "string", "pattern": "^ab$", "maxLength": 1}, "empty"),
        ({"type": "integer", "minimum": 1, "maximum": 2, "multipleOf": 5}, "multiple of 5"),
        ({"type": "integer", "multipleOf": 0}, "multipleOf"),
        ({"type": "object", "propertyNames": {"minLength": 3}}, "propertyNames"),
    ],
)
def test_unsupported_schemas_are_refused(schema: Any, expected: str) -> None:
    """A schema that no answer matches, or that cannot be enforced, is refused in one line that names the keyword."""
    message = grammar.check(grammar.for_json_schema(schema))
    assert message is not None
    assert expected in message
    assert len(message) <= 300
    assert "\n" not in message


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "null",
        '{"grammars": 5}',
        '{"grammars": [5]}',
        '{"grammars": []}',
        "start: /a/",
        "[" * 10**6,
    ],
)
def test_not_a_grammar(text: str) -> None:
    """Text that is not one of our grammars is refused, not compiled."""
    assert grammar.check(text) is not None


ODD_VALUES: list[Any] = [
    None,
    True,
    -1,
    1.5,
    10**400,
    "a",
    "[",
    [],
    {},
    [[]],
    [{}],
    [None],
    ["a", {}],
    {"a": []},
    {"a": {}},
    {"type": [{}]},
]


@pytest.mark.parametrize(
    "keyword",
    [
        *("type", "enum", "const", "required", "properties", "patternProperties", "propertyNames", "items"),
        *("additionalProperties", "additionalItems", "prefixItems", "allOf", "anyOf", "oneOf", "not", "$ref"),
        *("$defs", "$id", "format", "pattern", "minimum", "maximum", "exclusiveMinimum", "multipleOf"),
        *("exclusiveMaximum", "minItems", "uniqueItems", "dependentRequired", "x-guidance", "description"),
    ],
)
def test_odd_values_of_a_keyword(keyword: str) -> None:
    """Clients send any JSON. A schema is accepted or refused in a sentence; no exception is raised."""
    for value in ODD_VALUES:
        node = {keyword: value}
        tagged = {"type": "object", "required": ["a"], "properties": {"a": node}} | node
        for schema in (node, tagged, {"oneOf": [tagged, tagged]}, {"minimum": 0, "maximum": 1} | node):
            message = schema_limits.refusal(json_schema.rewrite(schema))
            assert message is None or message.endswith(".")


def test_rewritten_schemas_are_never_laxer() -> None:
    """The rewritten schema accepts nothing that the client's schema refuses."""
    values = [
        None,
        True,
        1,
        1.5,
        "a",
        "zz",
        [],
        [1],
        {},
        {"kind": "a"},
        {"kind": "b"},
        {"a": 1},
        {"c": 1},
        {"a": "x"},
    ]
    schemas: list[Any] = [
        {"oneOf": [{"type": "integer"}, {"type": "string"}]},
        {"oneOf": [{"const": "a"}, {"enum": ["b", 1]}]},
        {
            "oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}],
            "$defs": {
                k: {"type": "object", "properties": {"kind": {"const": k}}, "required": ["kind"]}
                for k in "ab"
            },
        },
        {
            "type": "object",
            "propertyNames": {"enum": ["a", "b"]},
            "additionalProperties": {"type": "integer"},
        },
        {"type": "object", "propertyNames": {"pattern": "^a"}},
        {"anyOf": [{"not": {}}, {"type": "integer"}]},
    ]
    for schema in schemas:
        rewritten = json_schema.rewrite(schema)
        assert rewritten != schema
        for value in values:
            is_allowed = jsonschema.Draft202012Validator(rewritten).is_valid(value)
            assert not is_allowed or jsonschema.Draft202012Validator(schema).is_valid(value), (
                schema,
                value,
            )


@pytest.mark.parametrize(
    "options",
    [
        [{"type": "integer"}, {"type": "number"}],
        [{"const": 1}, {"const": 1.0}],
        [{"type": "object"}, {"type": "object", "required": ["a"]}],
        [
            {"type": "object", "properties": {"k": {"const": "a"}}, "additionalProperties": False},
            {"type": "object", "properties": {"k": {"const": "b"}}, "additionalProperties": False},
        ],
        [{"type": "string"}, {"$ref": "https://example.com"}],
        [{}, {"type": "string"}],
        [{"type": ["string", "null"]}, {"type": ["integer", "null"]}],
    ],
)
def test_overlapping_options_of_one_of_stay(options: list[Any]) -> None:
    """Options that one value could match together are not rewritten to anyOf."""
    assert json_schema.rewrite({"oneOf": options}) == {"oneOf": options}


@pytest.mark.parametrize(
    ("pattern", "steps"),
    [
        ("^abc$", 5),
        ("a{10}", 10),
        ("(a{10}){10}", 100),
        ("((ab){2,3}c){4}", 28),
        ("[a-z{2}]{3}", 3),
        (r"\{{2}", 2),
        (r"\p{L}{1,5}", 5),
        (r"\d{1,100000}", 1000),
        ("(ab){5,}", 10),
        ("a{,5}", 6),
        (")(", 0),
    ],
)
def test_pattern_steps(pattern: str, steps: int) -> None:
    """Nested repetitions multiply, others add up; those in a class or escaped do not count."""
    assert abs(schema_limits.pattern_steps(pattern) - steps) <= 1 + (pattern == "a{,5}") * 5


def test_grammars_are_json() -> None:
    """A grammar is one JSON object, whatever characters names contain."""
    schema = {
        "type": "object",
        "properties": {'"\\\n</tool_call>': {"type": "integer"}},
        "additionalProperties": False,
    }
    text = grammar.for_json_schema(schema)
    assert json.loads(text)["grammars"][0]["json_schema"]["properties"] == schema["properties"]
    assert msgspec.json.decode(text)
    assert accepts(text, json.dumps({'"\\\n</tool_call>': 1}))


@pytest.mark.parametrize(
    ("schema", "answer", "matches"),
    [
        ({"type": "string", "pattern": '^[^"]*$'}, '"a\\"b"', False),
        ({"type": "string", "pattern": '^[^"]*$'}, '"a b\u00e9"', True),
        ({"type": "string", "pattern": '^[^\\\\/:*?"<>|]+$'}, '"a\\\\b\\"c"', False),
        ({"type": "string", "pattern": "^[a\\[^]+$"}, '"a[^"', True),
        (
            {"type": "object", "patternProperties": {'^[^"]$': True}, "additionalProperties": False},
            '{"\\"":1}',
            False,
        ),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, "0", False),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, "0.25", True),
        ({"type": "number", "exclusiveMinimum": 2, "maximum": 2.5}, "2", False),
        ({"type": "number", "minimum": -0.5, "exclusiveMaximum": 0}, "-0", False),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, "0.0001", True),
        ({"type": "number", "exclusiveMinimum": 0}, "0.0000000000000000", False),
        ({"type": "number", "exclusiveMinimum": 1, "maximum": 1.5}, "1", False),
        ({"type": "number", "exclusiveMinimum": -2, "exclusiveMaximum": -1}, "-1.999", True),
        ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}, "0.9", True),
        ({"type": "integer", "multipleOf": 7}, "999999999999994", True),
        ({"type": "integer", "multipleOf": 7}, "7" * 16, False),
        ({"type": "integer", "multipleOf": 7, "minimum": 10**15}, "1" * 18, True),
        ({"type": "number", "minimum": -5, "exclusiveMaximum": 0}, "-4.5", True),
    ],
)
def test_excluded_characters_and_bounds(schema: dict[str, Any], answer: str, matches: bool) -> None:
    """Escapes of characters that a class excludes, and exclusive bounds, are refused: such answers would not validate."""
    assert accepts(grammar.for_json_schema(schema), answer) == matches


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        (grammar.for_regex(r"^a/b\d+$"), {"a/b12": True, "a/b": False, "xa/b1": False}),
        (grammar.for_regex("a\nb|\\/"), {"a\nb": True, "/": True, "a": False}),
        (grammar.for_regex('a/\nstart: "z"'), {'a/\nstart: "z"': True, "z": False}),
        (
            grammar.for_choice(['say "hi"', "é😀\n", "x\\n"]),
            {'say "hi"': True, "é😀\n": True, "x\\n": True, "\n": False},
        ),
        (grammar.for_choice(["a", "ab"]), {"a": True, "ab": True, "b": False}),
    ],
)
def test_expressions_and_choices(text: str, accepted: dict[str, bool]) -> None:
    """The complete answer matches; no character of an expression or a choice is syntax of the grammar around it."""
    assert grammar.check(text) is None
    assert {answer: accepts(text, answer) for answer in accepted} == accepted
