"""Which objects of a JSON Schema may be closed: those that name their properties and do not say whether others are allowed.

Small models invent keys without end, so an object is closed if no instance of a plain reading is lost: `properties` without
`additionalProperties` allows the named ones only. `"additionalProperties": true` opens an object. Used by
`common.schema.json_schema`. Where several subschemas apply to one value (`allOf`, or `anyOf` and `$ref` next to other keywords), none of
them is closed by itself, since each names only some of the properties: together they are closed to the names of all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from common.schema.document import ANNOTATIONS, Document, as_dict, as_list, types

_UNIONS = ("anyOf", "oneOf")
_SILENT = ANNOTATIONS | {"$schema", "type"}
"""Keywords that say nothing about properties."""
_OPEN = frozenset(
    "patternProperties propertyNames minProperties not if then else dependentSchemas dependencies".split()  # noqa: SIM905 (a table)
)
"""Keywords next to which subschemas that apply together stay as open as they are."""
_MAX_VISITS = 20_000
"""No object is closed in a schema that takes more."""
_ANY_NAME = "*"
_ALL_NAMES = frozenset((_ANY_NAME,))
_IN_VALUE = ("properties", "patternProperties")
_ITEMS = ("items", "additionalItems", "additionalProperties")
_LISTED_ITEMS = ("prefixItems", "items")


class Closing:
    """The decisions for one schema.

    Args:
        document: The client's schema, before it is rewritten.
    """

    def __init__(self, document: Document) -> None:
        self._document = document
        self._shared: set[int] = set()  # apply to a value together with another subschema
        self._alone: set[int] = set()
        self._num_visits = 0
        self._walk()

    def close(self, node: dict[str, Any], new: dict[str, Any]) -> None:
        """Close `new`, the rewritten `node`, if that is safe."""
        if id(node) not in self._alone or id(node) in self._shared:
            return
        if self._in_place(node):
            names = self._joint_names(node)
            if names is not None:
                closed = {"properties": dict.fromkeys(names, True), "additionalProperties": False}
                new["allOf"] = [*as_list(new.get("allOf")), closed]
                new.pop("unevaluatedProperties", None)
        elif _is_silent(node) and (properties := _closed_properties(node)) is not None:
            new["properties"] = properties
            new["additionalProperties"] = False

    def _walk(self) -> None:
        # Schemas to visit, each with the properties that others name, too, of those that apply to the same value; None: it is alone.
        pending: list[tuple[dict[str, Any], frozenset[str] | None]] = [(self._document.nodes[""], None)]
        seen: set[tuple[int, frozenset[str] | None]] = set()
        while pending:
            node, repeated = pending.pop()
            if (id(node), repeated) in seen:
                continue
            seen.add((id(node), repeated))
            self._num_visits += 1
            if self._num_visits > _MAX_VISITS:
                self._alone.clear()
                return
            (self._alone if repeated is None else self._shared).add(id(node))
            inner = self._in_place(node)
            if repeated is None and inner and not _is_wrapper(node):
                repeated = self._repeated_names(node)
            pending += [(child, repeated) for child in inner]
            for name, child in _values(node):
                is_alone = repeated is None or not (name in repeated or _ANY_NAME in repeated)
                pending.append((child, None if is_alone else _ALL_NAMES))
            pending += [(child, None if repeated is None else _ALL_NAMES) for child in _items(node)]

    def _in_place(self, node: dict[str, Any]) -> list[dict[str, Any]]:
        """The subschemas that apply to the same value."""
        found = [child for key in ("allOf", *_UNIONS) for child in as_list(node.get(key))]
        if "$ref" in node:
            found.append(self._document.target(node["$ref"]))
        return [child for child in found if isinstance(child, dict)]

    def _joined(self, node: dict[str, Any]) -> list[dict[str, Any]]:
        """The schema and all that apply to the same value, also indirectly."""
        found: dict[int, dict[str, Any]] = {}
        pending = [node]
        while pending:
            each = pending.pop()
            if id(each) not in found:
                found[id(each)] = each
                pending += self._in_place(each)
        self._num_visits += len(found)
        return list(found.values())

    def _repeated_names(self, node: dict[str, Any]) -> frozenset[str]:
        """The properties that several of the schemas name which apply to the same value as `node`."""
        joined = self._joined(node)
        if any(each.get("patternProperties") or each.get("additionalProperties") for each in joined):
            return _ALL_NAMES
        counts = Counter(name for each in joined for name in as_dict(each.get("properties")))
        return frozenset(name for name, count in counts.items() if count > 1)

    def _joint_names(self, node: dict[str, Any]) -> dict[str, None] | None:
        """The properties that the schema and those that apply with it name; None: it must stay open, or is closed already."""
        if _is_wrapper(node):
            return None  # its only subschema is closed by itself
        joined = self._joined(node)
        if self._num_visits > 2 * _MAX_VISITS or not any(
            isinstance(each.get("properties"), dict) for each in joined
        ):
            return None
        names: dict[str, None] = {}
        for each in joined:
            if each.keys() & _OPEN or not _allows_closing(each) or self._has_open_option(each):
                return None
            names |= dict.fromkeys(as_dict(each.get("properties")))
        # If others are forbidden, an object that needs one of them is impossible, and must stay so.
        if not any(each.get("unevaluatedProperties") is False for each in joined):
            required = (name for each in joined for name in as_list(each.get("required")))
            names |= dict.fromkeys(name for name in required if isinstance(name, str))
        return names

    def _has_open_option(self, node: dict[str, Any]) -> bool:
        """Whether an option of a union is any object."""
        options = [self._document.resolved(each) for key in _UNIONS for each in as_list(node.get(key))]
        return any(
            option is True
            or (isinstance(option, dict) and "object" in types(option) and not option.keys() - _SILENT)
            for option in options
        )


def _is_wrapper(node: dict[str, Any]) -> bool:
    """Whether one subschema, or one union, says all about the value."""
    keys = node.keys() - _SILENT
    if keys == {"allOf"}:
        return len(as_list(node["allOf"])) == 1
    return keys in ({"$ref"}, {"anyOf"}, {"oneOf"})


def _allows_closing(node: dict[str, Any]) -> bool:
    return all(node.get(key, False) is False for key in ("additionalProperties", "unevaluatedProperties"))


def _is_silent(node: dict[str, Any]) -> bool:
    """Whether the schema names properties, and does not say whether there may be others."""
    is_said = node.keys() & {"additionalProperties", "unevaluatedProperties"}
    return isinstance(node.get("properties"), dict) and not is_said


def _closed_properties(node: dict[str, Any]) -> dict[str, Any] | None:
    """The properties of an object once it is closed; None: no object could match then, or fewer than are meant."""
    properties: dict[str, Any] = node["properties"]
    missing = [
        name for name in as_list(node.get("required")) if isinstance(name, str) and name not in properties
    ]
    if missing and node.get("patternProperties"):
        return None
    properties = properties | dict.fromkeys(missing, True)
    min_properties = node.get("minProperties", 0)
    if not isinstance(min_properties, (int, float)) or min_properties > len(properties):
        return None
    return properties


def _values(node: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for key in _IN_VALUE:
        for name, child in as_dict(node.get(key)).items():
            if isinstance(child, dict):
                yield name, child


def _items(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    found = [node.get(key) for key in _ITEMS]
    found += [child for key in _LISTED_ITEMS for child in as_list(node.get(key))]
    return (child for child in found if isinstance(child, dict))
