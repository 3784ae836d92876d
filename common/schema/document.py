"""A JSON Schema taken apart: its subschemas by JSON pointer, where references lead, which types and values may match.

What `common.schema.json_schema` and `common.schema.limits` read schemas with. Takes anything that JSON can be, since clients send
it: what is not as JSON Schema 2020-12 has it counts as absent, and is left for llguidance to refuse.
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
    """A schema with its subschemas; no more of them than one over `MAX_SCHEMAS`, give or take a list's.

    Attributes:
        nodes: By JSON pointer.
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
        """All that are more than true or false."""
        return (node for node in self.nodes.values() if isinstance(node, dict))

    def target(self, reference: Any) -> Any:
        """The subschema that a `$ref` names, or None."""
        if not isinstance(reference, str) or not reference.startswith("#"):
            return None
        return self.nodes.get(unquote(reference[1:]))

    def resolved(self, node: Any) -> Any:
        """`node`, or where its reference leads, if it is nothing but a reference."""
        for _ in range(_MAX_HOPS):
            if not isinstance(node, dict) or "$ref" not in node or node.keys() - ANNOTATIONS - {"$ref"}:
                break
            node = self.target(node["$ref"])
        return node

    def inner(self, node: dict[str, Any]) -> list[dict[str, Any]]:
        """What a schema is made of, and what it refers to."""
        found = [*(child for _, child in children(node)), self.target(node.get("$ref"))]
        return [child for child in found if isinstance(child, dict)]

    def inner_first(self) -> list[dict[str, Any]]:
        """All schemas, each behind those that it is made of and refers to, as far as there are no circles."""
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
    """The subschemas of a schema, with the JSON pointer that leads to each from it."""
    for key in _NAMED:
        for name, child in as_dict(node.get(key)).items():
            yield f"/{key}/{name.replace('~', '~0').replace('/', '~1')}", child
    for key in _LISTED:
        for i, child in enumerate(as_list(node.get(key))):
            yield f"/{key}/{i}", child
    for key in _ONE:
        if isinstance(node.get(key), (dict, bool)):
            yield f"/{key}", node[key]


def mapped(node: Any, function: Callable[[dict[str, Any]], Schema]) -> Any:
    """The schema with `function` applied to each subschema, outer ones first; it returns a new one each time."""
    new = function(node) if isinstance(node, dict) else node
    if not isinstance(new, dict):
        return new
    for key in _NAMED:
        if isinstance(new.get(key), dict):
            new[key] = {name: mapped(child, function) for name, child in new[key].items()}
    for key in _LISTED:
        if isinstance(new.get(key), list):
            new[key] = [mapped(child, function) for child in new[key]]
    for key in _ONE:
        if isinstance(new.get(key), dict):
            new[key] = mapped(new[key], function)
    return new


def types(node: Any) -> set[str]:
    """The types that may match, of JSON Schema's; `integer` counts as `number`."""
    named = node.get("type", [*_TYPES])
    found = {
        each for each in ([named] if isinstance(named, str) else as_list(named)) if isinstance(each, str)
    }
    found = {"number" if each == "integer" else each for each in found}
    return found & {_type(value) for value in values} if (values := literal_values(node)) else found


def literal_values(node: Any) -> list[Any]:
    """What `const` or `enum` lists."""
    return [node["const"]] if "const" in node else as_list(node.get("enum"))


def literals(node: Any) -> set[bytes] | None:
    """The values of `const` or `enum`, as text that differs where they do; None where it has neither, or cannot be told."""
    values = literal_values(node) if isinstance(node, dict) else []
    # 1 and 1.0 are the same to JSON Schema, and not as text.
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
