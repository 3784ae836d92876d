"""Schemas that clients send, and random walks through grammars; shared by the unit and model tests."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from worker.sampling.grammar import CompiledGrammar, GrammarMatcher

_LEAF = {
    "type": "object",
    "properties": {"x": {"type": "integer"}},
    "required": ["x"],
    "additionalProperties": False,
}


def tagged(name: str, /, **properties: Any) -> dict[str, Any]:
    """An object of a discriminated union, as pydantic writes it."""
    return {
        "type": "object",
        "title": name,
        "properties": {"kind": {"const": name, "title": "Kind", "type": "string"}, **properties},
        "required": ["kind", *properties],
    }


def closed(**properties: Any) -> dict[str, Any]:
    """An object of exactly these properties, as OpenAI's strict mode requires."""
    return {
        "type": "object",
        "properties": properties,
        "required": [*properties],
        "additionalProperties": False,
    }


SCHEMAS: dict[str, Any] = {
    "object": {"type": "object"},
    "anything": True,
    "empty object": closed(),
    "strict": closed(name={"type": "string"}, age={"type": "integer"}, ok={"type": "boolean"}),
    "optional": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "null"}},
        "additionalProperties": False,
    },
    "additional": {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "additionalProperties": {"type": "boolean"},
    },
    "required but not named": {"type": "object", "required": ["z"]},
    "nullable": closed(a={"type": ["string", "null"]}, b={"anyOf": [{"type": "integer"}, {"type": "null"}]}),
    "enum": closed(color={"enum": ["red", "green", 'q"uote', 3, None, {"a": [1]}]}),
    "const": closed(version={"const": 1}, kind={"const": "a/b"}),
    "numbers": closed(
        a={"type": "integer", "minimum": -3, "maximum": 1200},
        b={"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        c={"type": "integer", "multipleOf": 5},
    ),
    "zod's integer": closed(a={"type": "integer", "minimum": -9007199254740991, "maximum": 9007199254740991}),
    "strings": closed(
        a={"type": "string", "minLength": 2, "maxLength": 5},
        b={"type": "string", "pattern": "^[A-Z]{2}-\\d{3}$"},
        c={"type": "string", "pattern": "[a-m]x?"},
    ),
    "formats": closed(
        at={"type": "string", "format": "date-time"},
        day={"type": "string", "format": "date"},
        id={"type": "string", "format": "uuid"},
        file={"type": "string", "format": "file-path"},
    ),
    "array": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4},
    "tuple": {
        "type": "array",
        "prefixItems": [{"type": "integer"}, {"type": "string"}],
        "items": False,
        "minItems": 2,
    },
    "any of": {"anyOf": [closed(a={"type": "integer"}), closed(b={"type": "string"}), {"type": "boolean"}]},
    "all of": {
        "allOf": [{"$ref": "#/$defs/a"}, {"properties": {"b": {"type": "integer"}}, "required": ["b"]}],
        "$defs": {"a": {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}},
    },
    "pydantic's union": {
        "$defs": {
            "Cat": tagged("cat", lives={"type": "integer"}),
            "Dog": tagged("dog", name={"type": "string"}),
        },
        "properties": {
            "pet": {
                "discriminator": {
                    "mapping": {"cat": "#/$defs/Cat", "dog": "#/$defs/Dog"},
                    "propertyName": "kind",
                },
                "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
                "title": "Pet",
            }
        },
        "required": ["pet"],
        "title": "Owner",
        "type": "object",
    },
    "tree": {
        "$defs": {
            "Node": closed(
                value={"type": "integer"}, children={"type": "array", "items": {"$ref": "#/$defs/Node"}}
            )
        },
        "$ref": "#/$defs/Node",
    },
    "list by reference to the top": closed(next={"anyOf": [{"$ref": "#"}, {"type": "null"}]}),
    "endless branch": {
        "$defs": {"never": closed(again={"$ref": "#/$defs/never"})},
        "type": "object",
        "properties": {
            "a": {"$ref": "#/$defs/never"},
            "b": {"type": "array", "items": {"$ref": "#/$defs/never"}},
            "c": {"anyOf": [{"$ref": "#/$defs/never"}, {"type": "integer"}]},
        },
        "required": ["b", "c"],
        "additionalProperties": False,
    },
    "zod's record": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "propertyNames": {"type": "string"},
        "additionalProperties": _LEAF,
    },
    "names of an enum": {
        "type": "object",
        "propertyNames": {"enum": ["a", "b"]},
        "additionalProperties": {"type": "integer"},
    },
    "names by pattern": {
        "type": "object",
        "propertyNames": {"pattern": "^x-[a-z]+$"},
        "additionalProperties": {"type": "boolean"},
    },
    "names by pattern property": {
        "type": "object",
        "patternProperties": {"^s_": {"type": "string"}},
        "additionalProperties": False,
    },
    "zod's undefined": {"anyOf": [{"not": {}}, {"type": "integer"}]},
    "annotations": {
        "type": "integer",
        "title": "T",
        "description": "D",
        "default": 3,
        "examples": [1],
        "deprecated": True,
        "x-order": 1,
        "format": "int32",
    },
    "escapes in names": closed(
        **{'a"b': {"type": "integer"}, "a/b~c": {"type": "integer"}, "naïve": {"type": "integer"}}
    ),
}
"""By name; each is a schema that a client sends, or an edge case of one."""

_CLOSING = b'"}]'
_PLAIN = b",:-+. 0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ<>/"


class Walk:
    """One answer, drawn uniformly from the allowed tokens; after `num_free` tokens it heads for the end.

    Args:
        text_of: A token's bytes.
    """

    def __init__(
        self, compiled: CompiledGrammar, text_of: Callable[[int], bytes], seed: int, num_free: int = 40
    ) -> None:
        self.compiled = compiled
        self._text_of = text_of
        self._random = random.Random(seed)  # noqa: S311 (a test's)
        self._num_free = num_free
        self.token_ids: list[int] = []

    @property
    def text(self) -> str:
        """The generated text, as valid UTF-8."""
        return b"".join(self._text_of(i) for i in self.token_ids).decode()

    def run(self, most: int = 600) -> Walk:
        """Walk to the end of the answer; fails if it is not reached within `most` tokens."""
        matcher = GrammarMatcher(self.compiled)
        advance_all(matcher, self.token_ids)
        for _ in range(most):
            allowed = allowed_ids(matcher)
            token_id = self._draw(allowed)
            matcher.advance(token_id)
            if token_id in self.compiled.compiler.eos_token_ids:
                return self
            self.token_ids.append(token_id)
        raise AssertionError(f"the answer does not end: {self.text!r}")

    def _draw(self, allowed: list[int]) -> int:
        if len(self.token_ids) < self._num_free:
            return self._random.choice(allowed)
        by_rank: dict[int, list[int]] = {}
        for token_id in allowed:
            by_rank.setdefault(self._rank(token_id), []).append(token_id)
        # Sometimes a plain character instead of a closing one: a string may still require some.
        best = by_rank[
            3 if 3 in by_rank and min(by_rank) >= 0 and self._random.random() < 0.3 else min(by_rank)
        ]
        return self._random.choice([i for i in best if len(self._text_of(i)) == 1] or best)

    def _rank(self, token_id: int) -> int:
        if token_id in self.compiled.compiler.eos_token_ids:
            return -1
        first = self._text_of(token_id)[:1]
        return _CLOSING.find(first) if first in _CLOSING else 3 if first in _PLAIN else 4


def advance_all(matcher: GrammarMatcher, token_ids: Sequence[int]) -> None:
    """Append tokens to a matcher, in order."""
    for token_id in token_ids:
        matcher.advance(token_id)


def allowed_ids(matcher: GrammarMatcher) -> list[int]:
    """The token ids that a matcher allows, in ascending order."""
    bits = np.unpackbits(matcher.allowed().view(np.uint8), bitorder="little")
    return [int(i) for i in np.flatnonzero(bits)]
