"""The shape of a conversation, and a short conversation of that shape whose texts can be recognized.

What a template does with a conversation depends on its roles and on which fields are set, hardly ever on the texts. `planner` renders the
skeleton of a shape to see what the template loses. Repetitions are cut to two, so that a growing conversation keeps its shape. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from worker.text.templates.support import Messages

_MAX_PERIOD = 6
"""The longest repetition that is cut, in messages."""


class CallShape(NamedTuple):
    """What is known of a call: whether its arguments are text, and whether there are any."""

    is_text: bool
    has_arguments: bool


class MessageShape(NamedTuple):
    """What a template may see of a message besides its texts.

    Attributes:
        result_of: For a result: how many messages before it the call is, and the call's index; None: there is none.
    """

    role: str
    has_content: bool
    has_reasoning: bool
    has_name: bool
    calls: tuple[CallShape, ...]
    result_of: tuple[int, int] | None


Shape = tuple[MessageShape, ...]


def shape_of(messages: Messages) -> Shape:
    """The shape of a conversation, with repetitions cut."""
    calls: dict[str, tuple[int, int]] = {}
    shape: list[MessageShape] = []
    known: dict[
        MessageShape, MessageShape
    ] = {}  # equal shapes become the same object, which is faster to compare
    for index, message in enumerate(messages):
        content, own = message.get("content"), message.get("tool_calls") or ()
        for number, call in enumerate(own):
            calls[call.get("id") or ""] = (index, number)
        result_of = None
        if message["role"] == "tool" and (found := calls.get(message.get("tool_call_id") or "")):
            result_of = (index - found[0], found[1])
        new = MessageShape(
            message["role"],
            bool(content and not content.isspace()),
            bool(message.get("reasoning_content")),
            message.get("name") is not None,
            tuple([_call_shape(call["function"]["arguments"]) for call in own]),
            result_of,
        )
        shape.append(known.setdefault(new, new))
        _cut_repetition(shape)
    return tuple(shape)


def _call_shape(arguments: Any) -> CallShape:
    return CallShape(isinstance(arguments, str), bool(arguments))


def _cut_repetition(shape: list[MessageShape]) -> None:
    """Remove the last messages of a shape if the same ones precede them twice."""
    for period in range(1, min(_MAX_PERIOD, len(shape) // 3) + 1):
        if shape[-1] is shape[-1 - period] and (
            shape[-period:] == shape[-2 * period : -period] == shape[-3 * period : -2 * period]
        ):
            del shape[-period:]
            return


class Skeleton(NamedTuple):
    """A conversation of recognizable texts.

    Attributes:
        system: Words of system messages, each of which must be rendered once and in this order.
        contents: Words of the other messages, likewise.
        others: Words that must be rendered at least once: names and arguments of calls.
    """

    messages: Messages
    system: list[str]
    contents: list[str]
    others: list[str]


def make_skeleton(shape: Shape, words: Sequence[str] = ()) -> Skeleton:
    """Make a conversation of this shape.

    Args:
        words: Words that must be rendered in addition to those of the conversation.
    """
    skeleton = Skeleton([], [], [], list(words))
    for index, message in enumerate(shape):
        new: dict[str, Any] = {"role": message.role, "content": ""}
        word = f"probe{index:04}"
        if message.has_content:
            new["content"] = f"{word}content"
            (skeleton.system if message.role == "system" else skeleton.contents).append(new["content"])
        if message.has_reasoning:
            new["reasoning_content"] = f"{word}reasoning"
        if message.calls:
            new["tool_calls"] = [
                _make_call(call, word, index, number, skeleton.others)
                for number, call in enumerate(message.calls)
            ]
        if message.role == "tool":
            back, number = message.result_of or (0, 0)
            new["tool_call_id"] = _call_id(index - back, number)
            if message.has_name:
                new["name"] = f"probe{index - back:04}name{number}"
        elif message.has_name:
            new["name"] = f"{word}user"
        skeleton.messages.append(new)
    return skeleton


def _make_call(shape: CallShape, word: str, index: int, number: int, words: list[str]) -> dict[str, Any]:
    name, key, value = (f"{word}{kind}{number}" for kind in ("name", "key", "value"))
    words.append(name)
    arguments: Any = {}
    if shape.has_arguments:
        arguments = value if shape.is_text else {key: value}
        words += [value] if shape.is_text else [key, value]
    elif shape.is_text:
        arguments = ""
    return {
        "id": _call_id(index, number),
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def _call_id(index: int, number: int) -> str:
    """Nine letters or digits, which every template accepts; another one for each call."""
    return f"c{max(index, 0) % 16**5:05x}{number % 16**3:03x}"
