"""Limits on a client's JSON Schema, checked before llguidance compiles it.

llguidance's own limits bound its lexer. What they do not bound was found by attacking it (llguidance 1.9.1, two cores;
tests/unit/common/schema/test_grammar_attacks.py): twenty patterns that all have to match took 28 seconds and 2 GB, a multiple of two
large primes never returned, three hundred pattern properties took 5 seconds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from typing import Any

import msgspec

from common.schema.document import (
    ANNOTATIONS,
    MAX_SCHEMAS,
    Document,
    Schema,
    as_dict,
    as_list,
    literal_values,
    types,
)

MAX_BYTES = 128 * 1024
MAX_LEVELS = 100
"""Of nested JSON, not of schemas: serde_json allows 128."""
MAX_VALUES = 5_000
"""In all enums together, including those inside objects and arrays."""
MAX_CHARACTERS = 5_000
"""In a pattern, a name or a value."""
MAX_PATTERNS = 200
MAX_PATTERNS_TOGETHER = 6
"""That all have to match. Intersecting them takes exponential time: eight hard ones 4 ms, fourteen 7 s."""
MAX_ALTERNATIVES = 300
"""Objects and arrays that a parser has to follow at once. Thirty arrays of thirty each other: 1.5 s per mask."""
MAX_PATTERN_PROPERTIES = 20
MAX_MULTIPLE = 10_000
"""The automaton has a state per remainder."""
MAX_PATTERN_STEPS = 20_000
"""States of the automaton with all repetitions unrolled: ``(a{100}){100}`` has ten thousand."""
_MAX_STEPS_OF_CHARACTER = 1_000
"""A repetition of a single character is cheap, however long."""
_MAX_VISITS = 20_000
_COMPOSED = frozenset(("object", "array"))


def refusal(schema: Schema) -> str | None:
    """Why a schema is refused, as a sentence: it exceeds a limit, or a reference cannot be resolved. None if it is accepted."""
    if isinstance(schema, bool):
        return None
    return size_refusal(schema) or next(_complaints(Document(schema)), None)


def size_refusal(schema: Any) -> str | None:
    """Why a schema is too large, as a sentence, or None. Checked first: a large schema must not be traversed or kept.

    A value that is not an object passes.
    """
    if not isinstance(schema, dict):
        return None
    if is_deeper(schema, MAX_LEVELS):
        return f"The schema has more than {MAX_LEVELS} levels."
    if len(msgspec.json.encode(schema)) > MAX_BYTES:
        return f"The schema is longer than {MAX_BYTES} bytes."
    if len(Document(schema).nodes) > MAX_SCHEMAS:
        return f"The schema consists of more than {MAX_SCHEMAS} schemas."
    return None


def regex_refusal(pattern: str) -> str | None:
    """Why a regular expression for a complete answer is refused, as a sentence; None if it is accepted."""
    if len(pattern) > MAX_CHARACTERS:
        return f"The expression is longer than {MAX_CHARACTERS} characters."
    if pattern_steps(pattern) > MAX_PATTERN_STEPS:
        return f"The expression has nested repetitions, more than {MAX_PATTERN_STEPS} in all."
    return None


def is_deeper(value: Any, max_levels: int) -> bool:
    """Whether a JSON value is nested more deeply than `max_levels`; without recursion, since it may be very deep."""
    num_levels, level = 0, [value]
    while level and num_levels <= max_levels:
        num_levels, level = num_levels + 1, _next_level(level)
    return num_levels > max_levels


def pattern_steps(pattern: str) -> int:
    """About how many states the automaton of a regular expression has, with all repetitions unrolled."""
    groups, last, is_one = [0], 0, False  # steps of each open group; of the last part, which may be repeated
    for part in _REGEX_PARTS.finditer(pattern):
        if part["count"]:
            count = int((part["max"] or part["min"])[:9])
            more = last * (min(count, _MAX_STEPS_OF_CHARACTER) if is_one else count) - last
            groups[-1] += more
            last, is_one = last + more, False
        elif part["atom"]:
            groups[-1] += 1
            last, is_one = 1, True
        elif part[0] == "(":
            groups.append(0)
        elif part[0] == ")" and len(groups) > 1:
            last, is_one = groups.pop(), False
            groups[-1] += last
    return sum(groups)


_REGEX_PARTS = re.compile(
    r"(?P<atom>\\(?:[pPux]\{[^}]*\}|.)|\[\^?\]?(?:\\.|[^\]\\])*\]|[^\\()|{\[])"
    r"|(?P<count>\{(?P<min>\d+)(?:,(?P<max>\d*))?\})|.",
    re.DOTALL,
)


def _num_values(values: list[Any]) -> int:
    """The number of values, including nested ones."""
    num, level = 0, values
    while level and num <= MAX_VALUES:
        num, level = num + len(level), _next_level(level)
    return num


def _next_level(level: list[Any]) -> list[Any]:
    """The values inside the objects and arrays of a list, one level down."""
    containers = [
        each.values() if isinstance(each, dict) else each for each in level if isinstance(each, (dict, list))
    ]
    return [inner for container in containers for inner in container]


def _complaints(document: Document) -> Iterator[str]:
    nodes = list(document.schemas)
    if sum(len(as_list(node.get("required"))) for node in nodes) > MAX_SCHEMAS:
        yield f"The schema has more than {MAX_SCHEMAS} required properties."
    if sum(_num_values(literal_values(node)) for node in nodes) > MAX_VALUES:
        yield f"The schema's enums have more than {MAX_VALUES} values."
    if sum(len(_patterns(node)) + ("format" in node) for node in nodes) > MAX_PATTERNS:
        yield f"The schema has more than {MAX_PATTERNS} patterns."
    if sum(_num_alternatives(node, document) for node in nodes) > MAX_ALTERNATIVES:
        yield f"The schema has more than {MAX_ALTERNATIVES} alternatives that are objects or arrays."
    for node in nodes:
        yield from _complaints_of_one(node, document)
    yield from _complaints_of_multiples(nodes)
    yield from _complaints_of_intersections(document)


def _num_alternatives(node: dict[str, Any], document: Document) -> int:
    """How many options of a union are objects or arrays, not counting the first."""
    options = [
        document.resolved(option) for option in as_list(node.get("anyOf")) + as_list(node.get("oneOf"))
    ]
    composed = [
        option
        for option in options
        if option is True or (isinstance(option, dict) and types(option) & _COMPOSED)
    ]
    return max(0, len(composed) - 1)


def _complaints_of_one(node: dict[str, Any], document: Document) -> Iterator[str]:
    if "$ref" in node and document.target(node["$ref"]) is None:
        yield f"$ref must refer to a subschema (#/...), and {str(node['$ref'])[:60]} does not."
    if isinstance(node.get("$id"), str):
        yield "$id is supported only at the top of the schema."
    if len(as_dict(node.get("patternProperties"))) > MAX_PATTERN_PROPERTIES:
        yield f"patternProperties has more than {MAX_PATTERN_PROPERTIES} patterns."
    if "oneOf" in node and not as_list(node.get("oneOf")):
        yield "oneOf must be a list of schemas."
    strings: list[Any] = [*as_dict(node.get("properties")), *_patterns(node)]
    strings += [*literal_values(node), *as_list(node.get("required"))]
    if any(len(text) > MAX_CHARACTERS for text in strings if isinstance(text, str)):
        yield f"A pattern, a name or a value in the schema is longer than {MAX_CHARACTERS} characters."
    if any(pattern_steps(pattern) > MAX_PATTERN_STEPS for pattern in _patterns(node)):
        yield f"A pattern has nested repetitions, more than {MAX_PATTERN_STEPS} in all."


def _complaints_of_multiples(nodes: list[dict[str, Any]]) -> Iterator[str]:
    values = [node["multipleOf"] for node in nodes if "multipleOf" in node]
    if any(
        isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0 for value in values
    ):
        yield "multipleOf must be a number above 0."
        return
    # If schemas are intersected, a value must be a multiple of all.
    for group in [set(values)] if any(map(_is_intersection, nodes)) else [{value} for value in values]:
        if _common_multiple(group) > MAX_MULTIPLE:
            yield f"multipleOf of more than {MAX_MULTIPLE} steps is not supported."


def _complaints_of_intersections(document: Document) -> Iterator[str]:
    if len({pattern for node in document.schemas for pattern in _patterns(node)}) <= MAX_PATTERNS_TOGETHER:
        return
    num_visits = 0
    for node in filter(_is_intersection, document.schemas):
        seen: dict[int, dict[str, Any]] = {}
        pending = [node]
        while pending:
            inner = pending.pop()
            if id(inner) not in seen:
                seen[id(inner)] = inner
                pending += document.inner(inner)
        num_visits += len(seen)
        if len({pattern for inner in seen.values() for pattern in _patterns(inner)}) > MAX_PATTERNS_TOGETHER:
            yield (
                f"More than {MAX_PATTERNS_TOGETHER} patterns are below an allOf, patternProperties, or a $ref, anyOf "
                "or oneOf next to other keywords."
            )
        if num_visits > _MAX_VISITS:
            yield "The schema combines too many schemas that have patterns."


def _is_intersection(node: dict[str, Any]) -> bool:
    """Whether its subschemas have to match together with its other keywords."""
    unions = node.keys() & {"$ref", "anyOf", "oneOf"}
    others = node.keys() - ANNOTATIONS - {"$schema", "x-guidance"}
    return "allOf" in node or "patternProperties" in node or (bool(unions) and len(others) > 1)


def _common_multiple(values: set[float]) -> int:
    """The least common multiple, in units of the last decimal place of any value."""
    try:
        decimals = [Decimal(str(value)) for value in values]
        last = min([0, *(int(value.as_tuple().exponent) for value in decimals)])
        return math.lcm(*(int(value.scaleb(-last)) for value in decimals))
    except (InvalidOperation, OverflowError, ValueError):
        return MAX_MULTIPLE + 1


def _patterns(node: dict[str, Any]) -> list[str]:
    patterns = [node.get("pattern"), *as_dict(node.get("patternProperties"))]
    return [pattern for pattern in patterns if isinstance(pattern, str)]
