"""Parsers of one tool call in an answer's text, from the marker that begins it to its end.

`worker.text.answer_parser` creates one at the marker and feeds it the text that follows. `NativeCallParser` uses mlx-lm's parser of the
model's own format; `HermesCallParser` streams the arguments as they are generated. Text that turns out not to be a call is
released as it is, markers included. The output does not depend on how the text was cut into pieces.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from common.protocol import Piece, ToolArguments, ToolCall
from common.schema.grammar import CALL_END
from worker.text.stop_strings import StopMatcher

Part = str | Piece
"""A part of an answer: a string is content; anything else is reasoning or part of a tool call."""

ParseCall = Callable[[str, list[dict[str, Any]]], Any]
"""mlx-lm's tool parser: from the text between the markers, and the tools, to a call or a list of calls; raises any exception."""


@dataclass(slots=True)
class FeedResult:
    """What a call's parser made of some text.

    Attributes:
        parts: The parts that are certain now.
        rest: The text after the end of the call; None: the call goes on.
        end: The marker that ended it.
    """

    parts: list[Part] = field(default_factory=list)
    rest: str | None = None
    end: str = ""


class CallParser(Protocol):
    """See the module.

    Attributes:
        may_be_content: Whether the text that it holds may still turn out not to be a call.
    """

    may_be_content: bool

    def feed(self, text: str) -> FeedResult:
        """Add text; not called again after `FeedResult.rest` was returned."""

    def flush(self, *, is_cut: bool) -> list[Part]:
        """Release what is held at the end of the answer.

        Args:
            is_cut: Whether the answer was cut by its length: a call without its end marker is not reported then.
        """


class NativeCallParser:
    """Parses one call, or several, in the model's own format, when the text is complete.

    Args:
        start: The marker that began it.
        ends: The markers that end it; empty: the end of the answer ends it (Mistral).
        index: The first call's index in the answer.
    """

    def __init__(
        self, start: str, ends: Sequence[str], parse: ParseCall, tools: CallableTools, index: int
    ) -> None:
        self.may_be_content = True
        self._start = start
        self._has_end = bool(ends)
        self._ends = StopMatcher(ends)
        self._parse = parse
        self._tools = tools
        self._index = index
        self._texts: list[str] = []

    def feed(self, text: str) -> FeedResult:
        text, end, rest = self._ends.split(text)
        self._texts.append(text)
        if end is None:
            return FeedResult()
        return FeedResult(self._parse_complete(end), rest, end)

    def flush(self, *, is_cut: bool) -> list[Part]:
        self._texts.append(self._ends.flush())
        if is_cut and self._has_end:
            return [self._start + "".join(self._texts)]
        return self._parse_complete("")

    def _parse_complete(self, end: str) -> list[Part]:
        text = "".join(self._texts)
        calls = self._tools.parse_calls(self._parse, text)
        if calls is None:
            return [self._start + text + end]
        return _as_parts(calls, self._index)


_HEADER = re.compile(r'\s*\{\s*"name"\s*:\s*"([\w.:/@-]+)"\s*,\s*"arguments"\s*:\s*(?=\{)', re.ASCII)
_STRUCTURE = re.compile(r'[{}\[\]"]')
_STRING_END = re.compile(r'["\\]')


class HermesCallParser:
    """Parses ``{"name": ..., "arguments": {...}}</tool_call>``, the format of Hermes and Qwen models; streams the arguments.

    Text that does not begin like this is parsed when it is complete.

    Args:
        start: The marker that began it.
        index: The call's index in the answer.
    """

    def __init__(self, start: str, tools: CallableTools, index: int) -> None:
        self.may_be_content = True
        self._start = start
        self._tools = tools
        self._index = index
        self._header = ""
        self._is_irregular = False
        self._arguments: _ObjectScanner | None = None
        self._end = StopMatcher([CALL_END])

    def feed(self, text: str) -> FeedResult:
        if self._arguments is None:
            return self._feed_header(text)
        parts: list[Part] = []
        if not self._arguments.is_complete:
            arguments, text = self._arguments.feed(text)
            parts.append(ToolArguments(self._index, arguments))
        if not text or not self._arguments.is_complete:
            return FeedResult(parts)
        _, end, rest = self._end.split(text)
        return FeedResult(parts, rest if end is not None else None, CALL_END)

    def _feed_header(self, text: str) -> FeedResult:
        self._header += text
        match = None if self._is_irregular else _HEADER.match(self._header)
        if match is not None and match[1] in self._tools.names:
            self._arguments = _ObjectScanner()
            self.may_be_content = False
            result = self.feed(self._header[match.end() :])
            result.parts.insert(0, ToolCall(self._index, match[1]))
            return result
        self._is_irregular = self._is_irregular or match is not None
        end = self._header.find(CALL_END)
        if end < 0:
            return FeedResult()
        return FeedResult(
            self._parse_complete(self._header[:end], CALL_END), self._header[end + len(CALL_END) :], CALL_END
        )

    def flush(self, *, is_cut: bool) -> list[Part]:
        if self._arguments is not None:
            return []
        return [self._start + self._header] if is_cut else self._parse_complete(self._header, "")

    def _parse_complete(self, text: str, end: str) -> list[Part]:
        calls = self._tools.parse_calls(_parse_json, text)
        return [self._start + text + end] if calls is None else _as_parts(calls, self._index)


class _ObjectScanner:
    """Finds the end of a JSON object in text that begins with it.

    Attributes:
        is_complete: Whether its end was found.
    """

    def __init__(self) -> None:
        self.is_complete = False
        self._depth = 0
        self._is_in_string = False
        self._is_escaped = False

    def feed(self, text: str) -> tuple[str, str]:
        """Split `text` into what belongs to the object and what follows it."""
        position = 0
        while position < len(text):
            if self._is_escaped:
                self._is_escaped = False
                position += 1
                continue
            found = (_STRING_END if self._is_in_string else _STRUCTURE).search(text, position)
            if found is None:
                break
            position = found.end()
            self._track(found[0])
            if not self._depth:
                self.is_complete = True
                return text[:position], text[position:]
        return text, ""

    def _track(self, char: str) -> None:
        if char == '"':
            self._is_in_string = not self._is_in_string
        elif char == "\\":
            self._is_escaped = True
        else:
            self._depth += 1 if char in "{[" else -1


class CallableTools:
    """The functions that an answer may call; a call of any other function is content.

    Args:
        only: The only function that may be called, if the client named one.
        is_parallel: Whether several calls may come at once; otherwise only the first counts.
    """

    def __init__(
        self, tools: list[dict[str, Any]], only: str | None = None, *, is_parallel: bool = True
    ) -> None:
        self._is_parallel = is_parallel
        self._tools = tools
        self.names: Container[str] = (
            {only} if only is not None else {tool["function"]["name"] for tool in tools}
        )

    def parse_calls(self, parse: ParseCall, text: str) -> list[tuple[str, str]] | None:
        """Parse the calls in a text.

        Returns:
            Name and JSON arguments of each; None if the text is not calls of these functions.
        """
        try:
            parsed = parse(text, self._tools)
            calls = [_name_and_arguments(call) for call in (parsed if isinstance(parsed, list) else [parsed])]
        except Exception:  # noqa: BLE001 (mlx-lm's parsers raise ValueError, KeyError, SyntaxError, ...)
            return None
        if not calls or not all(name in self.names for name, _ in calls):
            return None
        return calls if self._is_parallel else calls[:1]


def _name_and_arguments(call: Any) -> tuple[str, str]:
    """Convert a parsed call to its name and JSON arguments.

    Raises:
        Exception: It is not a call.
    """
    # "parameters" is what Llama 3 was trained to write.
    arguments = call["arguments"] if "arguments" in call else call.get("parameters", {})
    if isinstance(arguments, str):
        arguments = json.loads(arguments) if arguments.strip() else {}
    if not isinstance(call["name"], str) or not isinstance(arguments, dict):
        raise TypeError(call)
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:  # a lone surrogate can be sent only if escaped
            text = json.dumps(arguments, allow_nan=False)
    return call["name"], text


def _parse_json(text: str, _tools: list[dict[str, Any]]) -> Any:
    return json.loads(text)


def _as_parts(calls: list[tuple[str, str]], index: int) -> list[Part]:
    parts: list[Part] = []
    for i, (name, arguments) in enumerate(calls, index):
        parts += [ToolCall(i, name), ToolArguments(i, arguments)]
    return parts
