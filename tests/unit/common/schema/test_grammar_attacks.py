"""Schemas made to crash or stall the process that compiles them: each is accepted or refused with little time and memory."""

from __future__ import annotations

import gc
import json
import random
import resource
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.protocol import ToolUse
from common.schema import function_schema, grammar, limits

ROOT = Path(__file__).parents[4]
CPU_SECONDS = 60
MAX_BYTES = 3 << 30


def nested(keyword: str, levels: int) -> Any:
    """Nested schemas."""
    schema: Any = {"type": "integer"}
    for _ in range(levels):
        wraps = {"properties": {"a": schema}, "items": schema}
        schema = {keyword: wraps.get(keyword, [schema, {"type": "string"}])}
    return schema


def doubling(keyword: str, levels: int) -> Any:
    """References that expand to 2 ** levels schemas."""
    defs: dict[str, Any] = {f"d{i}": {keyword: [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(levels)}
    defs[f"d{levels}"] = {"type": "object", "properties": {"x": {"type": "integer"}}}
    return {"$defs": defs, "$ref": "#/$defs/d0"}


def shuffled_chain(length: int) -> Any:
    """A chain of references in random order, whose end is found last from either side."""
    order = [*range(length)]
    random.Random(1).shuffle(order)  # noqa: S311 (a test's)
    defs: dict[str, Any] = {
        f"d{i}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}, "required": ["a"]}
        for i in order
    }
    return {"$defs": defs | {f"d{length}": {"type": "null"}}, "$ref": "#/$defs/d0"}


def product(factors: int, options: int) -> Any:
    """An intersection of unions, which has options ** factors options."""
    names = [[f"p{i}_{j}" for j in range(options)] for i in range(factors)]
    return {"allOf": [{"anyOf": [{"type": "object", "required": [name]} for name in row]} for row in names]}


def strings(*patterns: str, **more: Any) -> Any:
    """A string that matches all of them."""
    return {"allOf": [{"type": "string", "pattern": pattern} for pattern in patterns], **more}


TWINS = [f".*{chr(97 + i)}.{{{i + 5}}}b.*" for i in range(20)]
NAMES = [f"p{i}" for i in range(10_000)]

ATTACKS: dict[str, Any] = {
    "objects of many references": {
        "$defs": {
            f"d{i}": {"properties": {f"p{i}": True}, **({"$ref": f"#/$defs/d{i + 1}"} if i < 599 else {})}
            for i in range(600)
        },
        "properties": {f"x{i}": {"$ref": f"#/$defs/d{i}"} for i in range(600)},
    },
    "properties, 50 levels": nested("properties", 49),
    "properties, 400 levels": nested("properties", 400),
    "items, 400 levels": nested("items", 400),
    "anyOf, 33 levels": nested("anyOf", 33),
    "allOf, 33 levels": nested("allOf", 33),
    "minItems": {"type": "array", "minItems": 10**9, "items": {"type": "integer"}},
    "maxItems": {"type": "array", "maxItems": 10**9, "items": {"type": "integer"}},
    "minItems beyond 64 bits": {"type": "array", "minItems": 10**30},
    "minItems in minItems": {"minItems": 10**5, "items": {"minItems": 10**5, "items": {"minItems": 10**5}}},
    "maxLength": {"type": "string", "maxLength": 10**9},
    "minLength": {"type": "string", "minLength": 10**9},
    "minLength beyond 64 bits": {"type": "string", "minLength": 2**64},
    "minLength of a pattern": {
        "type": "string",
        "pattern": "^(aaa|bbb)*$",
        "minLength": 10**4,
        "maxLength": 10**4 + 1,
    },
    "length of words": {
        "type": "string",
        "pattern": "^(.{97}|.{89})*$",
        "minLength": 5000,
        "maxLength": 5000,
    },
    "pattern of a million": {"type": "string", "pattern": "^(a{1000}){1000}$"},
    "pattern of a million again": {"type": "string", "pattern": "^((a{100}){100}){100}$"},
    "pattern of too many states": {"type": "string", "pattern": "^(a|b)*a(a|b){200}$"},
    "pattern of too many states, open": {"type": "string", "pattern": "(.*a.{1000})+"},
    "pattern of many letters": {"type": "string", "pattern": "^(\\p{L}|\\p{N}){500}(\\p{L}{200}){90}$"},
    "pattern of parentheses": {"type": "string", "pattern": "(" * 2000 + "a" + ")" * 2000},
    "pattern of stars": {"type": "string", "pattern": "(" * 200 + "a" + "*)" * 200},
    "pattern that is long": {"type": "string", "pattern": "|".join(f"(x{i}.*y{i})" for i in range(5000))},
    "patterns, 200": {"properties": {n: {"type": "string", "pattern": f".*{n}.{{50}}"} for n in NAMES[:200]}},
    "patterns, 20 at once": strings(*TWINS),
    "patterns, 4 at once": strings(*TWINS[:4]),
    "patterns at once, by references": {
        "$defs": {f"d{i}": {"type": "string", "pattern": twin} for i, twin in enumerate(TWINS)},
        "allOf": [{"$ref": f"#/$defs/d{i}"} for i in range(20)],
    },
    "patterns at once, by siblings": {
        "$defs": {f"d{i}": {"pattern": twin, "$ref": f"#/$defs/d{i + 1}"} for i, twin in enumerate(TWINS)}
        | {"d20": {"type": "string"}},
        "$ref": "#/$defs/d0",
    },
    "patterns at once, by anyOf": {
        "type": "string",
        "pattern": TWINS[0],
        "anyOf": [
            {
                "pattern": TWINS[1],
                "anyOf": [{"pattern": TWINS[2], "anyOf": [{"pattern": twin} for twin in TWINS[3:]]}],
            }
        ],
    },
    "patterns at once, nested": {
        "pattern": TWINS[0],
        "anyOf": [
            {
                "pattern": TWINS[1],
                "anyOf": [
                    {
                        "pattern": TWINS[2],
                        "anyOf": [
                            {
                                "pattern": TWINS[3],
                                "anyOf": [
                                    {
                                        "pattern": TWINS[4],
                                        "anyOf": [
                                            {
                                                "pattern": TWINS[5],
                                                "anyOf": [{"pattern": t} for t in TWINS[6:10]],
                                            }
                                        ],
                                    }
                                ],
                            }
                        ],
                    }
                ],
            }
        ],
    },
    "pattern properties, 300": {"patternProperties": {f"^{n}_": {"type": "integer"} for n in NAMES[:300]}},
    "pattern properties, 20 hard": {
        "patternProperties": {f"^(a|b)*a(a|b){{{i + 10}}}$": {} for i in range(20)}
    },
    "pattern properties and names": {
        "properties": {name: {"type": "integer"} for name in NAMES[:1500]},
        "patternProperties": {f"^(a|b)*{i}(a|b){{20}}$": {} for i in range(10)},
    },
    "enum of 100,000": {"enum": NAMES * 10},
    "enum of 10,000": {"enum": NAMES},
    "enum of objects": {"enum": [{"a": i, "b": [i]} for i in range(3000)]},
    "const of a million": {"const": "x" * 10**6},
    "const of 120,000": {"const": ["xy" * 2000] * 30},
    "name of a million": {"properties": {"k" * 10**6: {}}},
    "doubling allOf": doubling("allOf", 30),
    "doubling anyOf": doubling("anyOf", 30),
    "doubling prefixItems": doubling("prefixItems", 30),
    "product of unions": product(10, 10),
    "product of two": product(40, 2),
    "properties, 10,000": {"properties": {name: {"type": "string"} for name in NAMES}},
    "properties, 1,900": {"properties": {name: {"type": "string"} for name in NAMES[:1900]}},
    "properties, 1,900 in an array": {
        "type": "array",
        "items": {"properties": {name: {} for name in NAMES[:1900]}},
    },
    "required, 10,000": {"type": "object", "required": NAMES},
    "required, 2,000": {"type": "object", "required": NAMES[:2000]},
    "reference to itself": {
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
        "$ref": "#/$defs/a",
    },
    "allOf of itself": {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {}]}}, "$ref": "#/$defs/a"},
    "anyOf of itself": {
        "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}},
        "$ref": "#/$defs/a",
    },
    "chain of references": shuffled_chain(600),
    "ambiguous": {
        "$defs": {
            f"a{i}": {"anyOf": [{"type": "array", "items": {"$ref": f"#/$defs/a{j}"}} for j in range(30)]}
            for i in range(30)
        },
        "$ref": "#/$defs/a0",
    },
    "ambiguous strings": {
        "anyOf": [{"type": "string", "minLength": i * 10, "maxLength": i * 10 + 5} for i in range(1000)]
    },
    "ambiguous objects": {
        "anyOf": [{"type": "object", "properties": {f"a{i}": {"maxLength": i}}} for i in range(900)]
    },
    "dates": {
        "anyOf": [{"properties": {"k": {"const": i}, "d": {"format": "date-time"}}} for i in range(190)]
    },
    "multipleOf": {"type": "integer", "multipleOf": 9999991},
    "multipleOf, primes": {"allOf": [{"type": "integer", "multipleOf": p} for p in (9973, 9967, 9949)]},
    "multipleOf, by siblings": {"type": "integer", "multipleOf": 9973, "anyOf": [{"multipleOf": 9967}]},
    "multipleOf, decimals": {"type": "number", "multipleOf": 1e-300, "minimum": 0.123456789, "maximum": 9.87},
    "multipleOf, not a number": {"type": "integer", "multipleOf": float("1e400")},
    "ranges": {
        "anyOf": [{"type": "integer", "minimum": i * 7919, "maximum": i * 104729 + 10} for i in range(1900)]
    },
    "minProperties": {"type": "object", "minProperties": 10**9},
    "maxProperties": {"type": "object", "maxProperties": 10**6},
    "oneOf of 1,000": {"oneOf": [{"const": name} for name in NAMES[:1000]]},
    "oneOf of references": {"oneOf": [{"$ref": "#"}] * 100},
    "strange types": {
        "properties": {"a": {"required": "x", "enum": 3, "allOf": {}, "properties": [], "type": {}}}
    },
    "strange bounds": {"minLength": -1, "maxItems": "x", "minItems": 1.5, "pattern": 7, "multipleOf": True},
    "strange names": {"properties": {"": {}, "\u0000": {}, "\ud7ff\U0010ffff": {}}, "$ref": "#/properties/"},
    "strange references": {"$ref": ["#"], "$defs": {"a": {"$ref": "#/%FF"}, "b": {"$ref": {}}}},
}

_ATTACK = """
import resource, sys
sys.path[:0] = [{root!r}, {here!r}]
resource.setrlimit(resource.RLIMIT_CPU, ({seconds}, {seconds}))
resource.setrlimit(resource.RLIMIT_AS, ({memory}, {memory}))
import msgspec, test_grammar_attacks as attacks
attacks.report()
"""


def report() -> None:
    """Check every schema in this process; print a line for each: name, both verdicts, CPU seconds, peak memory growth."""
    grammar.check(grammar.for_json_object())
    for name, schema in ATTACKS.items():
        before = resource.getrusage(resource.RUSAGE_SELF)
        complaint = grammar.check(grammar.for_json_schema(schema))
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
        tool_complaint = grammar.check(grammar.for_tool_calls(ToolUse(tools=[tool])))
        after = resource.getrusage(resource.RUSAGE_SELF)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        line = [name, complaint, tool_complaint, round(seconds, 3), after.ru_maxrss - before.ru_maxrss]
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


@pytest.fixture(scope="module")
def reports() -> dict[str, list[Any]]:
    """The report of each attack, made in a process with limited CPU time and memory."""
    code = _ATTACK.format(
        root=str(ROOT), here=str(Path(__file__).parent), seconds=CPU_SECONDS, memory=MAX_BYTES
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, (run.stdout[-200:], run.stderr[-2000:])
    return {line[0]: line[1:] for line in map(json.loads, run.stdout.splitlines())}


@pytest.mark.parametrize("name", ATTACKS)
def test_the_process_survives(reports: dict[str, list[Any]], name: str) -> None:
    """The attacked process accepts each schema or refuses it in one short line."""
    for complaint in reports[name][:2]:
        assert complaint is None or (0 < len(complaint) <= 300 and "\n" not in complaint)


@pytest.mark.parametrize(
    "name",
    [
        "pattern of a million",
        "patterns, 20 at once",
        "patterns at once, by references",
        "pattern properties, 300",
        "enum of 100,000",
        "const of a million",
        "product of unions",
        "properties, 10,000",
        "required, 10,000",
        "reference to itself",
        "ambiguous",
        "multipleOf",
        "multipleOf, primes",
    ],
)
def test_the_worst_schemas_are_refused(reports: dict[str, list[Any]], name: str) -> None:
    """Schemas that cost llguidance seconds or gigabytes, or that could only fail later, are refused."""
    assert reports[name][0] is not None


def bytes_left_by(act: Callable[[], object]) -> int:
    """Growth of Python's heap, in bytes, after `act`."""
    tracemalloc.start()
    try:
        act()
        gc.collect()
        return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


def check_all(schemas: list[dict[str, Any]]) -> list[str | None]:
    """What the two checks return for each schema, as an answer's format and as a function's parameters."""
    return [
        verdict
        for schema in schemas
        for verdict in (
            grammar.check(grammar.for_json_schema(schema)),
            function_schema.refusal({"name": "f", "parameters": schema}),
        )
    ]


@pytest.mark.parametrize("num_characters", [100_000, 2_000_000])
def test_checked_schemas_leave_no_memory_in_use(num_characters: int) -> None:
    """Whether a schema is accepted or refused for its size, nothing of its text is kept in the caches of verdicts."""

    def schemas(prefix: str) -> list[dict[str, Any]]:
        texts = [prefix + f"{i:02}" * (num_characters // 2) for i in range(10)]
        return [{"type": "object", "description": text} for text in texts]

    refused = [verdict is not None for verdict in check_all(schemas("warm-up"))]
    assert refused == [num_characters > limits.MAX_BYTES] * 20
    assert bytes_left_by(lambda: check_all(schemas("measured"))) < 200_000
