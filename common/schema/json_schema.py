"""Rewrites a client's JSON Schema with the keywords that llguidance supports.

Called by `common.schema.grammar`. The result is never laxer than the client's schema, so an answer that matches it validates against
the original. Follows docs/json_schema.md of llguidance 1.9 and JSON Schema 2020-12.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from common.schema import limits as schema_limits
from common.schema.closing import Closing
from common.schema.document import (
    ANNOTATIONS,
    Document,
    Schema,
    as_dict,
    as_list,
    literals,
    map_schemas,
    types,
)

_FORMATS = frozenset(
    "date-time time date duration email hostname ipv4 ipv6 uuid uri".split()  # noqa: SIM905 (a table)
)
_CLASS = re.compile(r"\\.|\[\^?(?:\\.|[^\]\\])*\]", re.DOTALL)
"""An escape, or a class of characters."""
_INSIDE = 1 / 1024
"""The largest share of a range that is lost at an excluded bound."""
_MIN_STEP = 1e-15
_MAX_EXACT = 2**53
"""From here on, floats have no fraction, and a bound is no neighbor of another number."""
_MAX_MULTIPLE = 10**15
_IN_PLACE = frozenset(("$ref", "allOf", "anyOf", "oneOf"))
"""Keywords whose subschemas apply to the same value."""
_MAX_OPTIONS = 100
"""Of a `oneOf`: each is compared with each."""
_MAX_PASSES = 8
"""Schemas not known to be finite by then count as infinite; real ones need two passes."""


def rewrite(schema: Schema) -> Schema:
    """An equivalent schema, or a stricter one; what cannot be expressed is left unchanged, and refused later.

    `oneOf` of options that exclude each other becomes `anyOf`; formats that are mere annotations are removed, as are options that
    only infinite values match; `propertyNames` becomes `properties` or `patternProperties`; objects that name their properties are
    closed (`common.schema.closing`); a `multipleOf` gets bounds.
    """
    if isinstance(schema, bool):
        return schema
    # $id is not needed; llguidance's options are ours, not the client's.
    root = {key: value for key, value in schema.items() if key not in ("$id", "id", "x-guidance")}
    if schema_limits.size_refusal(root):
        return root
    document = Document(root)
    closing = Closing(document)
    has_wide_bounds = any(_has_wide_bounds(node) for node in document.schemas)

    def rewritten(node: dict[str, Any], *, closes: bool) -> Schema:
        new = _rewritten(node, document)
        if isinstance(new, dict):
            if closes:
                closing.close(node, new)
            if not has_wide_bounds:
                _bound_multiples(new)
        return new

    closed = _pruned(map_schemas(root, lambda node: rewritten(node, closes=True)))
    if schema_limits.size_refusal(closed) is None:
        return closed
    return _pruned(map_schemas(root, lambda node: rewritten(node, closes=False)))


def _rewritten(node: dict[str, Any], document: Document) -> Schema:
    """Rewrite one subschema, but not its own subschemas."""
    if "not" in node and (node["not"] is True or node["not"] == {}):  # how zod 3 writes `undefined`
        return False
    new = dict(node)
    if isinstance(new.get("format"), str) and new["format"] not in _FORMATS:
        del new["format"]  # an annotation (JSON Schema 2020-12, Validation, 7.2.1)
    if new.get("uniqueItems") is False:
        del new["uniqueItems"]
    options = new.get("oneOf")
    if isinstance(options, list) and "anyOf" not in new and _are_exclusive(options, document):
        new = {"anyOf" if key == "oneOf" else key: value for key, value in new.items()}
    _replace_unevaluated_properties(new)
    if "propertyNames" in new:
        _replace_property_names(new, document.resolved(new["propertyNames"]))
    if isinstance(new.get("pattern"), str):
        new["pattern"] = _without_controls(new["pattern"])
    if isinstance(new.get("patternProperties"), dict):
        new["patternProperties"] = {_without_controls(k): v for k, v in new["patternProperties"].items()}
    _replace_exclusive_bounds(new)
    return new


def _without_controls(pattern: str) -> str:
    """A stricter pattern, whose negated classes exclude control characters, too.

    llguidance 1.9 escapes what JSON has to escape. A class that contains a control character then allows any escape, also those
    of quotes and backslashes that the class excludes.
    """
    return _CLASS.sub(
        lambda found: r"[^\x00-\x1f" + found[0][2:] if found[0].startswith("[^") else found[0], pattern
    )


def _replace_unevaluated_properties(node: dict[str, Any]) -> None:
    """Replace `unevaluatedProperties` by `additionalProperties` if no other subschema could evaluate properties."""
    if "unevaluatedProperties" not in node:
        return
    if node["unevaluatedProperties"] is True or "additionalProperties" in node:
        del node["unevaluatedProperties"]
    elif not node.keys() & _IN_PLACE:
        node["additionalProperties"] = node.pop("unevaluatedProperties")


def _replace_exclusive_bounds(node: dict[str, Any]) -> None:
    """Replace an exclusive bound by an inclusive one that is farther from 0, just inside the range.

    llguidance 1.9 would allow an integer bound itself if the range has no other integer, and -0 below 0. It excludes other bounds,
    but then allows zeros without end behind them. A bound of the other sign is exact.
    """
    if "number" not in types(node) or node.get("type") == "integer":
        return
    lows, highs = _numbers(node, "minimum", "exclusiveMinimum"), _numbers(node, "maximum", "exclusiveMaximum")
    if any(abs(bound) > _MAX_EXACT for bound in lows + highs):
        return
    low, high = max(lows, default=-math.inf), min(highs, default=math.inf)
    inside = (high - low) * _INSIDE
    if node.get("exclusiveMinimum") == low and 0 <= low < high:
        del node["exclusiveMinimum"]
        node["minimum"] = low + min(_step(low), inside)
    if node.get("exclusiveMaximum") == high and low < high <= 0:
        del node["exclusiveMaximum"]
        node["maximum"] = high - min(_step(high), inside)


def _step(bound: float) -> float:
    """The distance between an exclusive bound and the inclusive one that replaces it."""
    return max(_MIN_STEP, 4 * math.ulp(bound))


def _bound_multiples(node: dict[str, Any]) -> None:
    """Bound a multiple: a model that never writes one would otherwise add digits until it runs out of tokens."""
    if "multipleOf" in node:
        node.setdefault("minimum", -_MAX_MULTIPLE)
        node.setdefault("maximum", _MAX_MULTIPLE)


def _has_wide_bounds(node: dict[str, Any]) -> bool:
    """Whether an explicit bound excludes all multiples that `_bound_multiples` allows, or may if schemas are intersected."""
    bounds = _numbers(node, "minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "multipleOf")
    return any(abs(bound) >= _MAX_MULTIPLE for bound in bounds)


def _numbers(node: dict[str, Any], *keys: str) -> list[float]:
    return [node[key] for key in keys if isinstance(node.get(key), int | float)]


def _are_exclusive(options: list[Any], document: Document) -> bool:
    if len(options) > _MAX_OPTIONS:
        return False
    resolved = [document.resolved(option) for option in options]
    return all(_excludes(a, b, document) for i, a in enumerate(resolved) for b in resolved[i + 1 :])


def _excludes(a: Any, b: Any, document: Document) -> bool:
    """Whether no value can match both; False if unknown."""
    if not isinstance(a, dict) or not isinstance(b, dict):
        return a is False or b is False
    if not types(a) & types(b) or _are_disjoint(literals(a), literals(b)):
        return True
    if not (types(a) == types(b) == {"object"}):
        return False
    tags = _required(a) & _required(b)
    return any(_are_disjoint(_tag(a, name, document), _tag(b, name, document)) for name in tags)


def _required(node: dict[str, Any]) -> set[str]:
    return {name for name in as_list(node.get("required")) if isinstance(name, str)}


def _tag(node: dict[str, Any], name: Any, document: Document) -> set[bytes] | None:
    return literals(document.resolved(as_dict(node.get("properties")).get(name)))


def _are_disjoint(a: set[bytes] | None, b: set[bytes] | None) -> bool:
    return a is not None and b is not None and not a & b


def _replace_property_names(node: dict[str, Any], names: Any) -> None:
    """Replace `propertyNames` by other keywords, if possible."""
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
    """With `false` for subschemas that no finite value matches: a model could begin such a value, but never end it."""
    if isinstance(root, bool):
        return root
    document = Document(root)
    nodes = document.inner_first()
    finite: set[int] = set()
    for _ in range(_MAX_PASSES):
        num_known = len(finite)
        for node in nodes:
            if id(node) not in finite and _is_finite(node, finite, document):
                finite.add(id(node))
        if len(finite) == num_known:
            break
    pruned: Schema = map_schemas(root, lambda node: dict(node) if id(node) in finite else False)
    return pruned


def _is_finite(node: dict[str, Any], finite: set[int], document: Document) -> bool:
    """Whether some finite value matches, given the subschemas that are known to be finite."""

    def is_known(child: Any) -> bool:
        # llguidance explains what is simply false.
        return not isinstance(child, dict) or id(child) in finite

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
    min_items = node.get("minItems")
    if not isinstance(min_items, (int, float)) or min_items < 1:
        return
    items = node.get("items", True)
    first = as_list(node.get("prefixItems")) or as_list(items)
    num_first = min(len(first), int(min(min_items, len(first))))
    yield from first[:num_first]
    if min_items > len(first):
        yield node.get("additionalItems", True) if isinstance(items, list) else items
