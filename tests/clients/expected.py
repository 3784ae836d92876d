"""What every client must get. Nothing depends on the model's quality, except one answer that it knows."""

from __future__ import annotations

from typing import Any

ANSWER = "The capital of France is Paris."
PROMPT_TOKENS = 37
COMPLETION_TOKENS = 8
UNKNOWN_MODEL = "The model `no-such-model` does not exist."

_CONTINENTS = ("Africa", "Asia", "Europe")
_UNITS = ("celsius", "fahrenheit")
_MAX_DISTRICTS = 2
_MAX_LETTERS = 12


def is_city(value: Any) -> bool:
    """Whether it matches the schema of `City` (cases.py, vercel_client.mjs)."""
    return (
        set(value) == {"name", "continent", "is_capital", "districts"}
        and isinstance(value["name"], str)
        and len(value["name"]) <= _MAX_LETTERS
        and value["continent"] in _CONTINENTS
        and isinstance(value["is_capital"], bool)
        and len(value["districts"]) <= _MAX_DISTRICTS
        and all(type(district) is int for district in value["districts"])
    )


def is_call(name: str, arguments: Any) -> bool:
    """Whether it calls one of the functions that the clients offer, with valid arguments."""
    if name == "get_time":
        return set(arguments) == {"zone"} and type(arguments["zone"]) is int
    return (
        name == "get_weather"
        and set(arguments) == {"city", "unit"}
        and len(arguments["city"]) <= _MAX_LETTERS
        and arguments["unit"] in _UNITS
    )


def are_openai_calls(calls: list[list[Any]]) -> bool:
    """Whether there are calls (id, type, name, arguments), each with a unique id."""
    ids = {call_id for call_id, _, _, _ in calls}
    return (
        len(ids) == len(calls) > 0
        and all(call_id.startswith("call_") and kind == "function" for call_id, kind, _, _ in calls)
        and all(is_call(name, arguments) for _, _, name, arguments in calls)
    )


def without_ids(calls: list[list[Any]]) -> list[list[Any]]:
    """The parts of the calls that must repeat if the same request is sent again."""
    return [call[1:] for call in calls]
