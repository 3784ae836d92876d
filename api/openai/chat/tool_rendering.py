"""Calls and reasoning as OpenAI says them: deltas of a stream, or fields of a whole message.

Used by `chat_rendering`. A call's id follows from the answer's and the call's place in it, so that it is the same whichever
worker wrote it.
"""

from __future__ import annotations

import hashlib
from typing import Any

from common.protocol import Piece, Reasoning, ToolArguments, ToolCall

_ID_CHARACTERS = 24
"""OpenAI's have as many behind their prefix."""


class ToolRendering:
    """One choice of an answer.

    Args:
        key: What the ids follow from; another one for each choice.
        answers_functions: The deprecated form, in which there is one call at most, without an id.
    """

    def __init__(self, key: str, *, answers_functions: bool) -> None:
        self._key = key
        self._answers_functions = answers_functions
        self._thoughts: list[str] = []
        self._names: list[str] = []
        self._arguments: list[list[str]] = []

    # -- a stream ---------------------------------------------------------------------------------------------------

    def delta(self, piece: Piece) -> dict[str, Any]:
        """What a chunk's delta says of a piece: a call with its name first, then its arguments bit by bit."""
        match piece:
            case Reasoning(text):
                return {"reasoning_content": text}
            case ToolCall(index, name):
                call = self._call(index, name, "")
                return call if self._answers_functions else {"tool_calls": [{"index": index} | call]}
            case ToolArguments(index, text):
                if self._answers_functions:
                    return {"function_call": {"arguments": text}}
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}

    def reason(self, finish_reason: str) -> str:
        """The finish reason as this client knows it."""
        return "function_call" if self._answers_functions and finish_reason == "tool_calls" else finish_reason

    def _call(self, index: int, name: str, arguments: str) -> dict[str, Any]:
        function = {"name": name, "arguments": arguments}
        if self._answers_functions:
            return {"function_call": function}
        digest = hashlib.sha256(f"{self._key}/{index}".encode()).hexdigest()
        return {"id": f"call_{digest[:_ID_CHARACTERS]}", "type": "function", "function": function}

    # -- a whole message --------------------------------------------------------------------------------------------

    def add(self, piece: Piece) -> None:
        """Keep what a piece says; the pieces of a call follow its beginning."""
        match piece:
            case Reasoning(text):
                self._thoughts.append(text)
            case ToolCall(_, name):
                self._names.append(name)
                self._arguments.append([])
            case ToolArguments(index, text):
                self._arguments[index].append(text)

    def message(self, content: str) -> dict[str, Any]:
        """The message with this content, which is null where there are only calls."""
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self._thoughts:
            message["reasoning_content"] = "".join(self._thoughts)
        if not self._names:
            return message
        calls = [
            self._call(i, name, "".join(texts))
            for i, (name, texts) in enumerate(zip(self._names, self._arguments, strict=True))
        ]
        message["content"] = content or None
        return message | (calls[0] if self._answers_functions else {"tool_calls": calls})
