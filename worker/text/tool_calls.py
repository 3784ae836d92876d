"""One call in the text of an answer, from the marker that begins it to its end: how it is read.

`worker.text.answer_parser` makes a reader at the marker and feeds it what follows. `OwnCall` reads the model's own format with
mlx-lm's parser, `UniversalCall` ours, whose arguments come out while they are written. What is no call comes out as the
text that it is, markers included. The outcome does not depend on how the text was cut.
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
"""Of an answer: a string is content."""

ParseCall = Callable[[str, list[dict[str, Any]]], Any]
"""mlx-lm's tool parsers: text between the markers and the tools, to a call or a list of them; raises what it trips over."""


@dataclass(slots=True)
class CallReading:
    """What a reader made of some text.

    Attributes:
        rest: What follows the end of the call; None: it has not ended.
        end: The marker that ended it.
    """

    parts: list[Part] = field(default_factory=list)
    rest: str | None = None
    end: str = ""


class CallReader(Protocol):
    """See the module.

    Attributes:
        may_be_content: Whether what it holds may still turn out to be no call.
    """

    may_be_content: bool

    def feed(self, text: str) -> CallReading:
        """Take what follows; nothing once it has ended."""

    def flush(self, *, is_cut: bool) -> list[Part]:
        """What is left at the end of an answer.

        Args:
            is_cut: Its length ended it; a call without its end is not to be believed then.
        """


class OwnCall:
    """A call, or several, in the model's own format: known when it is whole.

    Args:
        start: The marker that it began with.
        ends: Those that end it; none: it goes to the end of the answer (Mistral).
        index: The first call's.
    """

    def __init__(
        self, start: str, ends: Sequence[str], parse: ParseCall, known: KnownTools, index: int
    ) -> None:
        self.may_be_content = True
        self._start = start
        self._has_end = bool(ends)
        self._ends = StopMatcher(ends)
        self._parse = parse
        self._known = known
        self._index = index
        self._texts: list[str] = []

    def feed(self, text: str) -> CallReading:
        said, end, rest = self._ends.split(text)
        self._texts.append(said)
        if end is None:
            return CallReading()
        return CallReading(self._parts(end), rest, end)

    def flush(self, *, is_cut: bool) -> list[Part]:
        self._texts.append(self._ends.flush())
        if is_cut and self._has_end:
            return [self._start + "".join(self._texts)]
        return self._parts("")

    def _parts(self, end: str) -> list[Part]:
        text = "".join(self._texts)
        calls = self._known.read(self._parse, text)
        if calls is None:
            return [self._start + text + end]
        return _as_parts(calls, self._index)


_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([\w-]+)"\s*,\s*"arguments"\s*:\s*(?=\{)', re.ASCII)
_STRUCTURE = re.compile(r'[{}\[\]"]')
_STRING_END = re.compile(r'["\\]')


class UniversalCall:
    """``{"name": ..., "arguments": {...}}</tool_call>``: the arguments come out as they come in.

    Text that does not begin like this is parsed when it is whole.
    """

    def __init__(self, start: str, known: KnownTools, index: int) -> None:
        self.may_be_content = True
        self._start = start
        self._known = known
        self._index = index
        self._head = ""
        self._is_odd = False
        self._arguments: _ObjectScanner | None = None
        self._end = StopMatcher([CALL_END])

    def feed(self, text: str) -> CallReading:
        if self._arguments is None:
            return self._feed_head(text)
        parts: list[Part] = []
        if not self._arguments.is_whole:
            arguments, text = self._arguments.take(text)
            parts.append(ToolArguments(self._index, arguments))
        if not text or not self._arguments.is_whole:
            return CallReading(parts)
        _, end, rest = self._end.split(text)
        return CallReading(parts, rest if end is not None else None, CALL_END)

    def _feed_head(self, text: str) -> CallReading:
        self._head += text
        found = None if self._is_odd else _HEAD.match(self._head)
        if found is not None and found[1] in self._known.names:
            self._arguments = _ObjectScanner()
            self.may_be_content = False
            reading = self.feed(self._head[found.end() :])
            reading.parts.insert(0, ToolCall(self._index, found[1]))
            return reading
        self._is_odd = self._is_odd or found is not None
        end = self._head.find(CALL_END)
        if end < 0:
            return CallReading()
        return CallReading(
            self._odd_parts(self._head[:end], CALL_END), self._head[end + len(CALL_END) :], CALL_END
        )

    def flush(self, *, is_cut: bool) -> list[Part]:
        if self._arguments is not None:
            return []
        return [self._start + self._head] if is_cut else self._odd_parts(self._head, "")

    def _odd_parts(self, text: str, end: str) -> list[Part]:
        calls = self._known.read(_parse_json, text)
        return [self._start + text + end] if calls is None else _as_parts(calls, self._index)


class _ObjectScanner:
    """Finds the end of a JSON object in text that begins with it."""

    def __init__(self) -> None:
        self.is_whole = False
        self._depth = 0
        self._is_in_string = False
        self._is_escaped = False

    def take(self, text: str) -> tuple[str, str]:
        """What of `text` is the object's, and what follows it."""
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
            self._see(found[0])
            if not self._depth:
                self.is_whole = True
                return text[:position], text[position:]
        return text, ""

    def _see(self, char: str) -> None:
        if char == '"':
            self._is_in_string = not self._is_in_string
        elif char == "\\":
            self._is_escaped = True
        else:
            self._depth += 1 if char in "{[" else -1


class KnownTools:
    """The functions that may be called; a call of another one is no call.

    Args:
        only: The only one, where there is one.
        is_parallel: Whether several calls may come at once; else the first counts.
    """

    def __init__(
        self, tools: list[dict[str, Any]], only: str | None = None, *, is_parallel: bool = True
    ) -> None:
        self._is_parallel = is_parallel
        self._tools = tools
        self.names: Container[str] = (
            {only} if only is not None else {tool["function"]["name"] for tool in tools}
        )

    def read(self, parse: ParseCall, text: str) -> list[tuple[str, str]] | None:
        """The calls in a text, as names and arguments in JSON; None if that is not what it is."""
        try:
            parsed = parse(text, self._tools)
            calls = [_name_and_arguments(call) for call in (parsed if isinstance(parsed, list) else [parsed])]
        except Exception:  # noqa: BLE001 (mlx-lm's parsers raise ValueError, KeyError, SyntaxError, ...)
            return None
        if not calls or not all(name in self.names for name, _ in calls):
            return None
        return calls if self._is_parallel else calls[:1]


def _name_and_arguments(call: Any) -> tuple[str, str]:
    """Raises:
    Exception: It is no call.
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
        except UnicodeEncodeError:  # half a surrogate pair: it can be escaped, and not sent otherwise
            text = json.dumps(arguments, allow_nan=False)
    return call["name"], text


def _parse_json(text: str, _tools: list[dict[str, Any]]) -> Any:
    return json.loads(text)


def _as_parts(calls: list[tuple[str, str]], index: int) -> list[Part]:
    parts: list[Part] = []
    for i, (name, arguments) in enumerate(calls, index):
        parts += [ToolCall(i, name), ToolArguments(i, arguments)]
    return parts
