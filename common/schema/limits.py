"""What a client's JSON Schema must not cost: bounds that are checked before llguidance sees it.

llguidance's own limits count what a lexer does. What they do not count was found by attacking it (llguidance 1.9.1, two
cores; tests/unit/common/test_grammar_attacks.py): twenty patterns that all have to match took 28 seconds and 2 GB, a multiple of two
large primes never came back, three hundred pattern properties took 5 seconds.
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
"""Of JSON, not of schemas: serde_json stops at 128."""
MAX_VALUES = 5_000
"""Of all enums together, those inside objects and arrays counted too."""
MAX_CHARACTERS = 5_000
"""Of a pattern, a name or a value."""
MAX_PATTERNS = 200
MAX_PATTERNS_TOGETHER = 6
"""The time to intersect them is exponential: hard ones take 4 ms if they are eight, and 7 s if they are fourteen."""
MAX_ALTERNATIVES = 300
"""Objects and arrays that a parser has to follow at once. Thirty that are thirty arrays of each other: 1.5 s a mask."""
MAX_PATTERN_PROPERTIES = 20
MAX_MULTIPLE = 10_000
"""An automaton with a state a remainder."""
MAX_PATTERN_STEPS = 20_000
"""Of an automaton that counts every repetition out: ``(a{100}){100}`` has ten thousand."""
_MAX_STEPS_OF_ONE = 1_000
"""A repetition of a single character is cheap, however long."""
_MAX_VISITS = 20_000
_COMPOSED = frozenset(("object", "array"))


def refusal(schema: Schema) -> str | None:
    """What is too much in a schema, or cannot be resolved, as a sentence; None where nothing is."""
    if isinstance(schema, bool):
        return None
    return size_refusal(schema) or next(_complaints(Document(schema)), None)


def size_refusal(schema: Any) -> str | None:
    """Whether a schema is too large, as a sentence. Checked first: a large one must not be walked or kept.

    What is not an object is left to the other checks.
    """
    if not isinstance(schema, dict):
        return None
    if _num_levels(schema) > MAX_LEVELS:
        return f"The schema has more than {MAX_LEVELS} levels."
    if len(msgspec.json.encode(schema)) > MAX_BYTES:
        return f"The schema is longer than {MAX_BYTES} bytes."
    if len(Document(schema).nodes) > MAX_SCHEMAS:
        return f"The schema consists of more than {MAX_SCHEMAS} schemas."
    return None


def pattern_steps(pattern: str) -> int:
    """How many states an automaton for a regular expression has, about, if it counts all repetitions out."""
    groups, last, is_one = [0], 0, False  # of each open group; of the last part, which may be repeated
    for part in _REGEX_PARTS.finditer(pattern):
        if part["count"]:
            count = int((part["most"] or part["least"])[:9])
            more = last * (min(count, _MAX_STEPS_OF_ONE) if is_one else count) - last
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
    r"|(?P<count>\{(?P<least>\d+)(?:,(?P<most>\d*))?\})|.",
    re.DOTALL,
)


def _num_levels(value: Any) -> int:
    """How deep a JSON value is nested, at most one more than allowed; without recursion, since it may be very deep."""
    level, row = 0, [value]
    while row and level <= MAX_LEVELS:
        level, row = level + 1, _insides(row)
    return level


def _num_values(values: list[Any]) -> int:
    """All of them, and those inside."""
    num, row = 0, values
    while row and num <= MAX_VALUES:
        num, row = num + len(row), _insides(row)
    return num


def _insides(row: list[Any]) -> list[Any]:
    """What the objects and arrays of a list hold, one level down."""
    insides = [
        each.values() if isinstance(each, dict) else each for each in row if isinstance(each, (dict, list))
    ]
    return [inner for inside in insides for inner in inside]


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
    """How many options of a union are objects or arrays, beside the first."""
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
        yield f"$ref has to lead to a schema in the schema (#/...), and {str(node['$ref'])[:60]} does not."
    if isinstance(node.get("$id"), str):
        yield "$id is supported at the top of the schema only."
    if len(as_dict(node.get("patternProperties"))) > MAX_PATTERN_PROPERTIES:
        yield f"patternProperties has more than {MAX_PATTERN_PROPERTIES} patterns."
    if "oneOf" in node and not as_list(node.get("oneOf")):
        yield "oneOf has to be a list of schemas."
    strings: list[Any] = [*as_dict(node.get("properties")), *_patterns(node)]
    strings += [*literal_values(node), *as_list(node.get("required"))]
    if any(len(text) > MAX_CHARACTERS for text in strings if isinstance(text, str)):
        yield f"A pattern, a name or a value in the schema is longer than {MAX_CHARACTERS} characters."
    if any(pattern_steps(pattern) > MAX_PATTERN_STEPS for pattern in _patterns(node)):
        yield f"A pattern repeats what it repeats, more than {MAX_PATTERN_STEPS} times in all."


def _complaints_of_multiples(nodes: list[dict[str, Any]]) -> Iterator[str]:
    values = [node["multipleOf"] for node in nodes if "multipleOf" in node]
    if any(
        isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0 for value in values
    ):
        yield "multipleOf has to be a number above 0."
        return
    # Where schemas are intersected, multiples of one and of the other become multiples of both.
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
                "or oneOf with other keywords beside it."
            )
        if num_visits > _MAX_VISITS:
            yield "The schema combines too many schemas that have patterns."


def _is_intersection(node: dict[str, Any]) -> bool:
    """Whether what it is made of has to match together with what else it says."""
    unions = node.keys() & {"$ref", "anyOf", "oneOf"}
    others = node.keys() - ANNOTATIONS - {"$schema", "x-guidance"}
    return "allOf" in node or "patternProperties" in node or (bool(unions) and len(others) > 1)


def _common_multiple(values: set[float]) -> int:
    """In units of the last decimal that any of them has."""
    try:
        decimals = [Decimal(str(value)) for value in values]
        last = min([0, *(int(value.as_tuple().exponent) for value in decimals)])
        return math.lcm(*(int(value.scaleb(-last)) for value in decimals))
    except (InvalidOperation, OverflowError, ValueError):
        return MAX_MULTIPLE + 1


def _patterns(node: dict[str, Any]) -> list[str]:
    patterns = [node.get("pattern"), *as_dict(node.get("patternProperties"))]
    return [pattern for pattern in patterns if isinstance(pattern, str)]
