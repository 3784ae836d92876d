"""Items of built-in tools that another server ran, in the history of a conversation.

What a tool was asked and what it returned becomes a call and its result, so that the model sees it. Items without anything that
a model could use, such as a finished web search, are skipped. Used by `api.openai.responses.history.conversation`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

SKIPPED = frozenset(
    {
        "compaction",
        "compaction_summary",
        "compaction_trigger",
        "computer_call",
        "computer_call_output",
        "configuration_update",
        "file_search_call",
        "ghost_snapshot",
        "image_generation_call",
        "mcp_approval_request",
        "mcp_approval_response",
        "mcp_list_tools",
        "program",
        "program_output",
        "tool_search_call",
        "tool_search_output",
        "web_search_call",
    }
)
"""Without a text for the model: opaque, an image, or a list of what could be called."""

_CALLED = ("action", "operation", "arguments", "code", "input", "queries")
_RETURNED = ("output", "outputs", "result", "results", "error")
"""Fields of the other kinds that say what was asked and what came back."""

KNOWN_KEYS = frozenset(
    {
        *_CALLED,
        *_RETURNED,
        "acknowledged_safety_checks",
        "agent",
        "approval_request_id",
        "call_id",
        "caller",
        "container_id",
        "created_by",
        "environment",
        "execution",
        "id",
        "max_output_length",
        "name",
        "namespace",
        "pending_safety_checks",
        "server_label",
        "status",
        "type",
    }
)
"""Of OpenAI's items of these kinds. Clients send back what they got, so those that the model does not need are not named."""


class Call(NamedTuple):
    """What a tool was asked; `arguments` is JSON if the item had an object."""

    call_id: str
    name: str
    arguments: str


class Result(NamedTuple):
    """What a tool returned."""

    call_id: str
    text: str


class Converted(NamedTuple):
    """An item as calls and results; none of either if it is skipped."""

    calls: list[Call]
    results: list[Result]

    @property
    def is_skipped(self) -> bool:
        return not (self.calls or self.results)


def convert(item: Mapping[str, Any], kind: str) -> Converted:
    """An item of a kind that is neither a message nor one of the client's own functions; also of one that is not known."""
    if kind in SKIPPED and not item.get("results"):  # a file search has them, if the client asked for them
        return Converted([], [])
    call_id = item.get("call_id") or item.get("id")
    if not isinstance(call_id, str):
        return Converted([], [])
    calls, results = [], []
    if not kind.endswith("_output"):
        asked = next((item[name] for name in _CALLED if item.get(name) is not None), None)
        if asked is not None:
            name = item.get("name")
            calls.append(
                Call(call_id, name if isinstance(name, str) else kind.removesuffix("_call"), _text(asked))
            )
    returned = next((item[name] for name in _RETURNED if item.get(name) is not None), None)
    if returned is not None and (calls or kind.endswith("_output")):
        results.append(Result(call_id, _text(returned)))
    return Converted(calls, results)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()
