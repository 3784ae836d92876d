"""A client's JSON Schema in the words that llguidance knows: what it refuses, but can be said otherwise.

Called by `common.schema.grammar`. What comes of it is never laxer, so that an answer that matches it validates against what the
client sent. Follows docs/json_schema.md of llguidance 1.9 and JSON Schema 2020-12.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from common.schema import limits as schema_limits
from common.schema.document import ANNOTATIONS, Document, Schema, as_dict, as_list, literals, mapped, types

_FORMATS = frozenset(
    "date-time time date duration email hostname ipv4 ipv6 uuid uri".split()  # noqa: SIM905 (a table)
)
_CLASS = re.compile(r"\\.|\[\^?(?:\\.|[^\]\\])*\]", re.DOTALL)
"""An escape, or a class of characters."""
_INSIDE = 1 / 1024
"""How much of a range is given up at an excluded bound."""
_MAX_OPTIONS = 100
"""Of a `oneOf`: each is compared to each."""
_MAX_PASSES = 8
"""What is not known to end by then counts as endless; schemas that people write need two."""


def treated(schema: Schema) -> Schema:
    """The same schema in other words, or a stricter one; what cannot be said stays as it is, to be refused.

    `oneOf` of options that exclude each other becomes `anyOf`; formats that nobody checks go, as do options that could
    never come to an end; `propertyNames` becomes `properties` or `patternProperties`.
    """
    if isinstance(schema, bool):
        return schema
    # Its own name is nobody's business; the options of llguidance are ours.
    root = {key: value for key, value in schema.items() if key not in ("$id", "id", "x-guidance")}
    if schema_limits.size_refusal(root):
        return root
    document = Document(root)
    return _pruned(mapped(root, lambda node: _rewritten(node, document)))


def _rewritten(node: dict[str, Any], document: Document) -> Schema:
    """One subschema; its own subschemas are as they were."""
    if "not" in node and (node["not"] is True or node["not"] == {}):  # how zod 3 writes `undefined`
        return False
    new = dict(node)
    if isinstance(new.get("format"), str) and new["format"] not in _FORMATS:
        del new["format"]  # an annotation (JSON Schema 2020-12, Validation, 7.2.1)
    if new.get("uniqueItems") is False:
        del new["uniqueItems"]
    options = new.get("oneOf")
    if isinstance(options, list) and "anyOf" not in new and _exclude_each_other(options, document):
        new = {"anyOf" if key == "oneOf" else key: value for key, value in new.items()}
    if "propertyNames" in new:
        _name_properties(new, document.resolved(new["propertyNames"]))
    if isinstance(new.get("pattern"), str):
        new["pattern"] = _without_controls(new["pattern"])
    if isinstance(new.get("patternProperties"), dict):
        new["patternProperties"] = {_without_controls(k): v for k, v in new["patternProperties"].items()}
    _keep_bounds_out(new)
    return new


def _without_controls(pattern: str) -> str:
    """A stricter pattern, whose negated classes leave out control characters, too.

    llguidance 1.9 writes what JSON has to escape, and lets a class that a control character is in have any escape, those of
    quotes and backslashes included that the class leaves out.
    """
    return _CLASS.sub(
        lambda found: r"[^\x00-\x1f" + found[0][2:] if found[0].startswith("[^") else found[0], pattern
    )


def _keep_bounds_out(node: dict[str, Any]) -> None:
    """Say an excluded bound by an included one beside it, where llguidance 1.9 would let the bound itself through.

    It does with whole numbers as bounds of a range that no other whole number is in, and with -0 below 0.
    """
    if "number" not in types(node):
        return
    lows, highs = _numbers(node, "minimum", "exclusiveMinimum"), _numbers(node, "maximum", "exclusiveMaximum")
    low, high = max(lows, default=-math.inf), min(highs, default=math.inf)
    if node.get("exclusiveMinimum") == low < high < low + 1:
        del node["exclusiveMinimum"]
        node["minimum"] = low + (high - low) * _INSIDE
    if node.get("exclusiveMaximum") == high and (high - 1 < low < high or high == 0 > low):
        del node["exclusiveMaximum"]
        node["maximum"] = high - min(1.0, high - low) * _INSIDE


def _numbers(node: dict[str, Any], *keys: str) -> list[float]:
    return [node[key] for key in keys if isinstance(node.get(key), int | float)]


def _exclude_each_other(options: list[Any], document: Document) -> bool:
    if len(options) > _MAX_OPTIONS:
        return False
    whole = [document.resolved(option) for option in options]
    return all(_excludes(a, b, document) for i, a in enumerate(whole) for b in whole[i + 1 :])


def _excludes(a: Any, b: Any, document: Document) -> bool:
    """Whether no value can match both; False where that cannot be told."""
    if not isinstance(a, dict) or not isinstance(b, dict):
        return a is False or b is False
    if not types(a) & types(b) or _are_disjoint(literals(a), literals(b)):
        return True
    if not (types(a) == types(b) == {"object"}):
        return False
    tags = {name for name in as_list(a.get("required")) if name in as_list(b.get("required"))}
    return any(_are_disjoint(_tag(a, name, document), _tag(b, name, document)) for name in tags)


def _tag(node: dict[str, Any], name: Any, document: Document) -> set[bytes] | None:
    return literals(document.resolved(as_dict(node.get("properties")).get(name)))


def _are_disjoint(a: set[bytes] | None, b: set[bytes] | None) -> bool:
    return a is not None and b is not None and not a & b


def _name_properties(node: dict[str, Any], names: Any) -> None:
    """Say `propertyNames` by other keywords, where that is possible."""
    meaning = set(names) - ANNOTATIONS if isinstance(names, dict) else set()
    is_plain = not node.get("properties") and not node.get("patternProperties")
    rest = node.get("additionalProperties", True)
    if names is True or (isinstance(names, dict) and meaning <= {"type"} and "string" in types(names)):
        del node["propertyNames"]
    elif is_plain and meaning <= {"type", "enum", "const"} and (known := _known_names(names)):
        del node["propertyNames"]
        node |= {"properties": dict.fromkeys(known, rest), "additionalProperties": False}
    elif is_plain and meaning <= {"type", "pattern"} and isinstance(as_dict(names).get("pattern"), str):
        del node["propertyNames"]
        node |= {"patternProperties": {names["pattern"]: rest}, "additionalProperties": False}


def _known_names(names: Any) -> list[str]:
    values = [names["const"]] if "const" in as_dict(names) else as_list(as_dict(names).get("enum"))
    return [value for value in values if isinstance(value, str)]


def _pruned(root: Schema) -> Schema:
    """With `false` for what no finite value matches: a grammar would let a model begin what it can never end."""
    if isinstance(root, bool):
        return root
    document = Document(root)
    nodes = document.inner_first()
    ending: set[int] = set()
    for _ in range(_MAX_PASSES):
        num_known = len(ending)
        for node in nodes:
            if id(node) not in ending and _ends(node, ending, document):
                ending.add(id(node))
        if len(ending) == num_known:
            break
    pruned: Schema = mapped(root, lambda node: dict(node) if id(node) in ending else False)
    return pruned


def _ends(node: dict[str, Any], ending: set[int], document: Document) -> bool:
    """Whether some finite value matches, as far as is known of the subschemas."""

    def is_known(child: Any) -> bool:
        # What is plainly false is llguidance's to explain.
        return not isinstance(child, dict) or id(child) in ending

    if "$ref" in node and not is_known(document.target(node["$ref"])):
        return False
    if not all(map(is_known, as_list(node.get("allOf")))):
        return False
    for options in (as_list(node.get("anyOf")), as_list(node.get("oneOf"))):
        if options and not any(map(is_known, options)):
            return False
    if "enum" in node or "const" in node:
        return True
    possible = types(node)
    return (
        bool(possible - {"object", "array"})
        or ("object" in possible and all(map(is_known, _required_properties(node))))
        or ("array" in possible and all(map(is_known, _required_items(node))))
        or not possible
    )


def _required_properties(node: dict[str, Any]) -> Iterator[Any]:
    properties = as_dict(node.get("properties"))
    for name in as_list(node.get("required")):
        if isinstance(name, str) and name in properties:
            yield properties[name]
        elif not node.get("patternProperties"):
            yield node.get("additionalProperties", True)


def _required_items(node: dict[str, Any]) -> Iterator[Any]:
    least = node.get("minItems")
    if not isinstance(least, (int, float)) or least < 1:
        return
    items = node.get("items", True)
    first = as_list(node.get("prefixItems")) or as_list(items)
    num_first = min(len(first), int(min(least, len(first))))
    yield from first[:num_first]
    if least > len(first):
        yield node.get("additionalItems", True) if isinstance(items, list) else items
