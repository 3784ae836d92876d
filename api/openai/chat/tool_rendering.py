"""Tool calls and reasoning as OpenAI writes them: deltas of a stream, or fields of a complete message.

Used by `api.openai.chat.rendering`. Must not know how chunks are written.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from api.generation.front_end import call_id
from api.openai.custom_input import InputExtractor, custom_input
from common.protocol import Piece, Reasoning, ToolArguments, ToolCall


class ToolRendering:
    """One choice of an answer.

    Args:
        key: What the ids are derived from; unique to the choice.
        as_function_call: Render the deprecated form, which has at most one call and no id.
        hides_reasoning: Leave the reasoning out.
        custom_tools: The functions that are rendered as custom tools, with plain text as their input.
    """

    def __init__(
        self,
        key: str,
        *,
        as_function_call: bool,
        hides_reasoning: bool = False,
        custom_tools: Collection[str] = (),
    ) -> None:
        self._key = key
        self._as_function_call = as_function_call
        self._hides_reasoning = hides_reasoning
        self._custom_tools = frozenset(custom_tools)
        # Index and input of the call that is being streamed, if it is one of a custom tool.
        self._custom_call: tuple[int, InputExtractor] | None = None
        self._reasoning: list[str] = []
        self._names: list[str] = []
        self._arguments: list[list[str]] = []

    def shown(self, pieces: list[Piece]) -> list[Piece]:
        """The pieces that the client gets."""
        if not self._hides_reasoning:
            return pieces
        return [piece for piece in pieces if not isinstance(piece, Reasoning)]

    def deltas(self, piece: Piece) -> list[dict[str, Any]]:
        """The deltas of the chunks for a piece: a call's first one has its name, the next ones parts of its arguments."""
        match piece:
            case Reasoning(text):
                return [{"reasoning_content": text}]
            case ToolCall(index, name):
                last = self.last_deltas()
                if name in self._custom_tools:
                    self._custom_call = index, InputExtractor()
                call = self._call(index, name, "")
                return [*last, call if self._as_function_call else {"tool_calls": [{"index": index} | call]}]
            case ToolArguments(index, text):
                if self._as_function_call:
                    return [{"function_call": {"arguments": text}}]
                if self._custom_call is not None:  # the arguments of a call come before the next call
                    return _input_deltas(index, self._custom_call[1].feed(text))
                return [{"tool_calls": [{"index": index, "function": {"arguments": text}}]}]

    def last_deltas(self) -> list[dict[str, Any]]:
        """The deltas that are due once the last call is complete."""
        if self._custom_call is None:
            return []
        (index, extractor), self._custom_call = self._custom_call, None
        return _input_deltas(index, extractor.finish())

    def reason(self, finish_reason: str) -> str:
        """The finish reason, in the form that the client asked for."""
        return "function_call" if self._as_function_call and finish_reason == "tool_calls" else finish_reason

    def _call(self, index: int, name: str, arguments: str) -> dict[str, Any]:
        function = {"name": name, "arguments": arguments}
        if self._as_function_call:
            return {"function_call": function}
        derived_id = call_id("call_", self._key, index)
        if name in self._custom_tools:
            custom = {"name": name, "input": custom_input(arguments)}
            return {"id": derived_id, "type": "custom", "custom": custom}
        return {"id": derived_id, "type": "function", "function": function}

    def add(self, piece: Piece) -> None:
        """Collect a piece; a call's arguments come after its `ToolCall`."""
        match piece:
            case Reasoning(text):
                self._reasoning.append(text)
            case ToolCall(_, name):
                self._names.append(name)
                self._arguments.append([])
            case ToolArguments(index, text):
                self._arguments[index].append(text)

    def message(self, content: str) -> dict[str, Any]:
        """The message with this content, which is null if there are only calls."""
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self._reasoning and not self._hides_reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        if not self._names:
            return message
        calls = [
            self._call(i, name, "".join(texts))
            for i, (name, texts) in enumerate(zip(self._names, self._arguments, strict=True))
        ]
        message["content"] = content or None
        return message | (calls[0] if self._as_function_call else {"tool_calls": calls})


def _input_deltas(index: int, text: str) -> list[dict[str, Any]]:
    """The delta of a custom tool's input, if there is any text."""
    return [{"tool_calls": [{"index": index, "custom": {"input": text}}]}] if text else []
