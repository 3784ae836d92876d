"""Whether the parameters of a function can be expressed as a grammar.

The API refuses strict functions that cannot be; for others, a worker allows any object as arguments. Independent of the model.
"""

from __future__ import annotations

from typing import Any

import msgspec

from common.digest_cache import DigestCache
from common.protocol import ToolUse
from common.schema import grammar, limits

_verdicts: DigestCache[str | None] = DigestCache(512)


def refusal(function: dict[str, Any]) -> str | None:
    """Why a function's parameters cannot be expressed, as one line for the client, or None. Takes up to tens of milliseconds the
    first time.
    """
    parameters = function.get("parameters")
    if complaint := limits.size_refusal(parameters):
        return complaint
    return _verdicts.get(msgspec.json.encode(parameters), lambda: _refusal(parameters))


def _refusal(parameters: Any) -> str | None:
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    return grammar.check(grammar.for_tool_calls(ToolUse(tools=[tool], is_required=True)))
