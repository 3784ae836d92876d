r"""The plain input of a custom tool, out of the JSON that the model generates: ``{"input": "print(1)\n"}``.

The input is extracted while it arrives, however the JSON is cut into pieces. Used by the renderings of chats and of responses.
"""

from __future__ import annotations

import functools
import re

import msgspec

from api.openai.fields.custom_tools import CUSTOM_INPUT

_START = re.compile(r'\s*\{\s*"' + CUSTOM_INPUT + r'"\s*:\s*"')
_CUT_START = re.compile(
    functools.reduce(
        lambda rest, part: rf"(?:{part}{rest})?",
        reversed([r"\s*\{", r'\s*"', *CUSTOM_INPUT, r'"\s*', r":\s*"]),
        "",
    )
    + r"\s*"
)
"""Any beginning of `_START`, such as that of a call cut by the limit on tokens."""

_COMPLETE = re.compile(
    r'(?:[^"\\]|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u(?![dD][89abAB])[0-9a-fA-F]{4}|\\[^u])*'
)
"""A part of a JSON string that ends neither within an escape nor between the two halves of a character."""


class InputExtractor:
    """See the module.

    Attributes:
        text: The input so far.
    """

    def __init__(self) -> None:
        self.text = ""
        self._json: list[str] = []
        # The part of the string that is not decoded yet; None: before or after the string.
        self._rest: str | None = None
        self._head = ""
        self._is_closed = False

    def feed(self, text: str) -> str:
        """Add a part of the JSON; returns the part of the input that is certain now."""
        self._json.append(text)
        if self._is_closed:
            return ""
        if self._rest is None:
            self._head += text
            start = _START.match(self._head)
            if start is None:
                return ""
            self._rest = self._head[start.end() :]
        else:
            self._rest += text
        return self._decode_rest()

    def finish(self) -> str:
        """The part of the input that was not returned yet, once the JSON is complete or was cut."""
        if self._rest is not None or self._is_closed:
            return ""
        # Not an object that begins with the input: what came is the input as it is, unless it was cut before the input.
        arguments = "".join(self._json)
        if _CUT_START.fullmatch(arguments):
            return ""
        try:
            decoded = msgspec.json.decode(arguments, type=dict[str, str])
        except (msgspec.DecodeError, RecursionError):
            decoded = {}
        self.text = decoded.get(CUSTOM_INPUT, arguments)
        return self.text

    def _decode_rest(self) -> str:
        assert self._rest is not None
        found = _COMPLETE.match(self._rest)
        assert found is not None
        raw, self._rest = found[0], self._rest[found.end() :]
        if self._rest.startswith('"'):
            self._rest, self._is_closed = None, True
        if not raw:
            return ""
        text = _decode_string(raw)
        self.text += text
        return text


def custom_input(arguments: str) -> str:
    """The input in the complete arguments of a call; empty if there are none yet."""
    extractor = InputExtractor()
    extractor.feed(arguments)
    extractor.finish()
    return extractor.text


def _decode_string(raw: str) -> str:
    """The value of a JSON string without its quotes; a model may write line breaks in it."""
    escaped = raw.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    try:
        return msgspec.json.decode(f'"{escaped}"', type=str)
    except msgspec.DecodeError:
        return raw
