"""Changes to a conversation that make a chat template render it completely. Pure.

`worker.text.templates.planner` chooses an `Adaptation` for each shape of conversation; each change applies only to the messages that
need it, so that the earlier part of a growing conversation stays as it is. Independent of templates and tokenizers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import product
from typing import Any

from worker.text.templates import tool_messages
from worker.text.templates.support import Messages, ToolMessageStyle, with_text_arguments

_PARAGRAPH = "\n\n"
"""Between merged texts."""


class SystemPlacement(IntEnum):
    """Where system messages stand."""

    AS_IS = 0
    FIRST = 1
    """Merged into one message at the beginning."""
    USER = 2
    """Merged, and put in front of the first user message: the template has no system role."""


@dataclass(frozen=True, slots=True)
class Adaptation:
    """Changes to a conversation; by default none.

    Attributes:
        system: Where system messages stand.
        drops_empty: Whether messages of the assistant without text and calls are left out.
        merges_turns: Whether consecutive messages of one role become one message.
        supplies_user: Whether a conversation that does not begin with a user message gets an empty one.
        splits_content: Whether text next to calls becomes a message of its own, in front of them.
        splits_calls: Whether parallel calls become consecutive ones, each followed by its results.
        wraps_arguments: Whether arguments that are not a JSON object become the value of one.
        drops_reasoning: Whether the reasoning of messages with calls is left out.
        answers_results: Whether an empty message of the assistant is put between results and a user message.
        orphans_as_text: Whether results without a call become user messages.
        calls_as_text: Whether all calls and results become text.
    """

    system: SystemPlacement = SystemPlacement.AS_IS
    drops_empty: bool = False
    merges_turns: bool = False
    supplies_user: bool = False
    splits_content: bool = False
    splits_calls: bool = False
    wraps_arguments: bool = False
    drops_reasoning: bool = False
    answers_results: bool = False
    orphans_as_text: bool = False
    calls_as_text: bool = False

    def apply(self, messages: Messages, style: ToolMessageStyle | None) -> Messages:
        """Change a conversation; the input is not modified.

        Args:
            style: How the template expects calls and results; None: it does not support them.
        """
        if self.calls_as_text or style is None:
            messages = tool_messages.render_as_text(messages)
        else:
            messages = self._convert_calls(messages, style)
        if self.drops_empty:
            messages = [
                m for m in messages if m["role"] != "assistant" or m.get("tool_calls") or _text(m).strip()
            ]
        if self.system is SystemPlacement.FIRST:
            messages = _merge_system(messages)
        elif self.system is SystemPlacement.USER:
            messages = _fold_system(messages)
        if self.merges_turns:
            messages = _merge_turns(messages)
        if self.supplies_user:
            messages = _supply_user(messages)
        return messages

    def _convert_calls(self, messages: Messages, style: ToolMessageStyle) -> Messages:
        if self.orphans_as_text:
            messages = _orphans_as_text(messages)
        if self.drops_reasoning:
            messages = [_without_reasoning(m) if m.get("tool_calls") else m for m in messages]
        if self.wraps_arguments:
            messages = [_wrap_arguments(m) if m.get("tool_calls") else m for m in messages]
        if self.splits_calls:
            messages = _split_calls(messages)
        if self.splits_content:
            messages = [part for m in messages for part in _split_content(m)]
        if self.answers_results:
            messages = _answer_results(messages)
        if style is ToolMessageStyle.STRINGS:
            messages = with_text_arguments(messages)
        return messages


_CALL_CHANGES = (
    "splits_content",
    "splits_calls",
    "wraps_arguments",
    "drops_reasoning",
    "answers_results",
    "orphans_as_text",
)


def candidates(messages: Messages, style: ToolMessageStyle | None, *, as_text: bool) -> Iterator[Adaptation]:
    """All adaptations of a conversation that can make a difference, the smallest first.

    Args:
        style: How the template expects calls and results; None: it does not support them.
        as_text: Whether calls and results become text in any case.
    """
    options = (False, True)
    calls: list[dict[str, Any]] = [{}]
    if any(m.get("tool_calls") or m["role"] == "tool" for m in messages):
        calls = [{"calls_as_text": True}]
        if style is not None and not as_text:
            unchanged = Adaptation().apply(messages, style)
            single: list[dict[str, Any]] = [{name: True} for name in _CALL_CHANGES]
            names = [
                name
                for flags in single
                for name in flags
                if replace(Adaptation(), **flags).apply(messages, style) != unchanged
            ]
            changes = [
                dict(zip(names, values, strict=True)) for values in product(options, repeat=len(names))
            ]
            calls = [*sorted(changes, key=lambda flags: sum(flags.values())), *calls]
    turns = list(product(SystemPlacement, options, options, options))  # the first four fields, in their order
    # A change to calls is smaller than a change to turns; all calls as text is larger than any.
    ranked = [(rank + 2 * sum(turn), turn, flags) for rank, flags in enumerate(calls) for turn in turns]
    for _, turn, flags in sorted(ranked, key=lambda each: each[0]):
        yield replace(Adaptation(*turn), **flags)


STRONGEST = (
    Adaptation(
        SystemPlacement.FIRST, drops_empty=True, merges_turns=True, supplies_user=True, calls_as_text=True
    ),
    Adaptation(
        SystemPlacement.USER, drops_empty=True, merges_turns=True, supplies_user=True, calls_as_text=True
    ),
)
"""The last resort: hardly any template raises with these."""


def _text(message: dict[str, Any]) -> str:
    return str(message.get("content") or "")


def _join(*texts: str) -> str:
    return _PARAGRAPH.join(text for text in texts if text)


def _merge_system(messages: Messages) -> Messages:
    system = [m for m in messages if m["role"] == "system"]
    if not system:
        return messages
    merged = system[0] | {"content": _join(*map(_text, system))}
    return [merged, *(m for m in messages if m["role"] != "system")]


def _fold_system(messages: Messages) -> Messages:
    """Put the system messages in front of the text of the first message, or in a user message of their own."""
    system = _join(*(_text(m) for m in messages if m["role"] == "system"))
    others = [m for m in messages if m["role"] != "system"]
    if not system and others:
        return others
    if not others or others[0]["role"] != "user":
        return [{"role": "user", "content": system}, *others]
    return [others[0] | {"content": _join(system, _text(others[0]))}, *others[1:]]


def _merge_turns(messages: Messages) -> Messages:
    """Merge consecutive messages of a user or of the assistant; the calls of the later message stay with its text."""
    turns: list[Messages] = []
    for message in messages:
        last = turns[-1][-1] if turns else None
        if (
            last is None
            or last["role"] != message["role"]
            or message["role"] == "tool"
            or last.get("tool_calls")
        ):
            turns.append([message])
        else:
            turns[-1].append(message)
    return [_merge(turn) for turn in turns]


def _merge(turn: Messages) -> dict[str, Any]:
    if len(turn) == 1:
        return turn[0]
    merged: dict[str, Any] = {}
    for message in turn:
        merged |= message
    merged["content"] = _join(*map(_text, turn))
    if reasoning := _join(*(str(m.get("reasoning_content") or "") for m in turn)):
        merged["reasoning_content"] = reasoning
    return merged


def _supply_user(messages: Messages) -> Messages:
    index = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
    if index < len(messages) and messages[index]["role"] == "user":
        return messages
    return [*messages[:index], {"role": "user", "content": ""}, *messages[index:]]


def _orphans_as_text(messages: Messages) -> Messages:
    called: set[str] = set()
    converted: Messages = []
    for message in messages:
        called.update(call.get("id", "") for call in message.get("tool_calls") or [])
        is_orphan = message["role"] == "tool" and message.get("tool_call_id") not in called
        converted += tool_messages.render_as_text([message]) if is_orphan else [message]
    return converted


def _answer_results(messages: Messages) -> Messages:
    answered: Messages = []
    for message in messages:
        if message["role"] == "user" and answered and answered[-1]["role"] == "tool":
            answered.append({"role": "assistant", "content": ""})
        answered.append(message)
    return answered


def _without_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key != "reasoning_content"}


def _wrap_arguments(message: dict[str, Any]) -> dict[str, Any]:
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        if isinstance(function["arguments"], str):
            call = call | {"function": function | {"arguments": {"arguments": function["arguments"]}}}  # noqa: PLW2901
        calls.append(call)
    return message | {"tool_calls": calls}


def _split_calls(messages: Messages) -> Messages:
    """One message a call, each followed by its results; the text and reasoning stay with the first call."""
    split: Messages = []
    index = 0
    while index < len(messages):
        message = messages[index]
        index += 1
        calls = message.get("tool_calls") or []
        if len(calls) < 2:  # noqa: PLR2004
            split.append(message)
            continue
        end = index
        while end < len(messages) and messages[end]["role"] == "tool":
            end += 1
        ids = {call.get("id") for call in calls}
        own: dict[Any, Messages] = {}
        others: Messages = []
        for result in messages[index:end]:
            call_id = result.get("tool_call_id")
            (own.setdefault(call_id, []) if call_id in ids else others).append(result)
        index = end
        for number, call in enumerate(calls):
            first = message if number == 0 else {"role": "assistant", "content": ""}
            split += [first | {"tool_calls": [call]}, *own.pop(call.get("id"), [])]
        split += others
    return split


def _split_content(message: dict[str, Any]) -> Messages:
    if not message.get("tool_calls") or not _text(message).strip():
        return [message]
    text = {key: value for key, value in message.items() if key not in ("tool_calls", "reasoning_content")}
    return [text, message | {"content": ""}]


def normalize_tools(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add a description and parameters where a function has none: some templates raise without them."""
    defaults = {"description": "", "parameters": {"type": "object", "properties": {}}}
    return [
        tool | {"function": defaults | {k: v for k, v in tool["function"].items() if v is not None}}
        for tool in tools
    ]
