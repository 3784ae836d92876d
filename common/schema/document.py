"""Access to a JSON Schema: its subschemas by JSON pointer, the targets of references, the types and values that may match.

Used by `common.schema.json_schema` and `common.schema.limits`. Accepts any JSON, since clients send it: a part that is not valid in
JSON Schema 2020-12 counts as absent, and llguidance refuses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote

import msgspec

Schema = dict[str, Any] | bool

MAX_SCHEMAS = 2_000

ANNOTATIONS = frozenset(
    "$comment $defs default definitions deprecated description examples readOnly title writeOnly".split()  # noqa: SIM905 (a table)
)
"""Keywords that any value matches."""

_ONE = ("items", "additionalItems", "additionalProperties", "propertyNames", "contains", "not")
_LISTED = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_NAMED = ("$defs", "definitions", "properties", "patternProperties")
_TYPES = ("null", "boolean", "number", "string", "array", "object")
_MAX_HOPS = 100


class Document:
    """A schema with its subschemas. Reading stops when there are more than `MAX_SCHEMAS`.

    Attributes:
        nodes: Subschemas by JSON pointer.
    """

    def __init__(self, root: dict[str, Any]) -> None:
        self.nodes: dict[str, Any] = {"": root}
        pending = [("", root)]
        while pending and len(self.nodes) <= MAX_SCHEMAS:
            pointer, node = pending.pop()
            for step, child in children(node):
                self.nodes[pointer + step] = child
                if isinstance(child, dict):
                    pending.append((pointer + step, child))

    @property
    def schemas(self) -> Iterator[dict[str, Any]]:
        """All subschemas that are objects, not just true or false."""
        return (node for node in self.nodes.values() if isinstance(node, dict))

    def target(self, reference: Any) -> Any:
        """The subschema that a `$ref` names, or None."""
        if not isinstance(reference, str) or not reference.startswith("#"):
            return None
        return self.nodes.get(unquote(reference[1:]))

    def resolved(self, node: Any) -> Any:
        """`node`, or the target of its reference if it is just a reference."""
        for _ in range(_MAX_HOPS):
            if not isinstance(node, dict) or "$ref" not in node or node.keys() - ANNOTATIONS - {"$ref"}:
                break
            node = self.target(node["$ref"])
        return node

    def inner(self, node: dict[str, Any]) -> list[dict[str, Any]]:
        """The subschemas of a schema, and the target of its reference."""
        found = [*(child for _, child in children(node)), self.target(node.get("$ref"))]
        return [child for child in found if isinstance(child, dict)]

    def inner_first(self) -> list[dict[str, Any]]:
        """All schemas, each after its subschemas and the targets of its references, except in cycles."""
        ordered: list[dict[str, Any]] = []
        entered: set[int] = set()
        pending = [(node, False) for node in self.schemas]
        while pending:
            node, is_left = pending.pop()
            if is_left:
                ordered.append(node)
            elif id(node) not in entered:
                entered.add(id(node))
                pending.append((node, True))
                pending += [(child, False) for child in self.inner(node)]
        return ordered


def children(node: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The subschemas of a schema, each with its relative JSON pointer."""
    for key in _NAMED:
        for name, child in as_dict(node.get(key)).items():
            yield f"/{key}/{name.replace('~', '~0').replace('/', '~1')}", child
    for key in _LISTED:
        for i, child in enumerate(as_list(node.get(key))):
            yield f"/{key}/{i}", child
    for key in _ONE:
        if isinstance(node.get(key), (dict, bool)):
            yield f"/{key}", node[key]


def map_schemas(node: Any, function: Callable[[dict[str, Any]], Schema]) -> Any:
    """The schema with `function` applied to each subschema, outer ones first; `function` must return a new object."""
    new = function(node) if isinstance(node, dict) else node
    if not isinstance(new, dict):
        return new
    for key in _NAMED:
        if isinstance(new.get(key), dict):
            new[key] = {name: map_schemas(child, function) for name, child in new[key].items()}
    for key in _LISTED:
        if isinstance(new.get(key), list):
            new[key] = [map_schemas(child, function) for child in new[key]]
    for key in _ONE:
        if isinstance(new.get(key), dict):
            new[key] = map_schemas(new[key], function)
    return new


def types(node: Any) -> set[str]:
    """The JSON Schema types that may match; `integer` counts as `number`."""
    named = node.get("type", [*_TYPES])
    found = {
        each for each in ([named] if isinstance(named, str) else as_list(named)) if isinstance(each, str)
    }
    found = {"number" if each == "integer" else each for each in found}
    return found & {_type(value) for value in values} if (values := literal_values(node)) else found


def literal_values(node: Any) -> list[Any]:
    """The values of `const` or `enum`."""
    return [node["const"]] if "const" in node else as_list(node.get("enum"))


def literals(node: Any) -> set[bytes] | None:
    """The values of `const` or `enum` as comparable text; None if there are none, or if text does not compare as the values do."""
    values = literal_values(node) if isinstance(node, dict) else []
    # 1 and 1.0 are equal in JSON Schema, but not as text.
    if not values or any(isinstance(value, (float, list, dict)) for value in values):
        return None
    return {msgspec.json.encode(value) for value in values}


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _type(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, float)):
        return "number"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"
