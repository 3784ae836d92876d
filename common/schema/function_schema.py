"""Whether the arguments of a function can be put into a grammar.

The API refuses a strict function of which they cannot; a worker lets other ones have any object. Knows no model.
"""

from __future__ import annotations

import functools
from typing import Any

import msgspec

from common.protocol import ToolUse
from common.schema import grammar

_NUM_KEPT = 512


def refusal(function: dict[str, Any]) -> str | None:
    """Why not, as one line for the client, or None. Up to tens of milliseconds the first time."""
    return _refusal(msgspec.json.encode(function.get("parameters")))


@functools.lru_cache(maxsize=_NUM_KEPT)
def _refusal(parameters: bytes) -> str | None:
    function = {"name": "f", "parameters": msgspec.json.decode(parameters)}
    tool = {"type": "function", "function": function}
    return grammar.check(grammar.for_tool_calls(ToolUse(tools=[tool], is_required=True)))
