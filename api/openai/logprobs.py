"""Log-probabilities, aligned with the text that a client gets.

A worker reports each token at once, but its text may be held back (half a character, the possible start of a stop string)
and cut at a stop string. Items are emitted with their text, and concatenate to exactly that text. Used by the renderings;
bytes are decoded as the worker's detokenizer does it.
"""

from __future__ import annotations

import codecs
from collections import deque
from dataclasses import dataclass
from typing import Any

from common.protocol import Delta, Echo, TokenLogprob

MIN_LOGPROB = -9999.0
"""OpenAI's value for minus infinity, which JSON does not have."""


@dataclass(slots=True)
class Item:
    """A token with the characters that it completes.

    Attributes:
        text: May be empty: the token ends within a character.
        data: The bytes of all items concatenate to the text's UTF-8, and those of a character that the answer's end cuts off.
        logprob: None for the first token of an echoed prompt, which has nothing before it.
    """

    text: str
    data: bytes
    logprob: float | None
    top: list[TokenLogprob]


class LogprobAligner:
    """The items of one choice. A group of tokens ends at a character boundary: mostly one token, rarely several."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._open: list[Item] = []
        self._groups: deque[list[Item]] = deque()
        self._num_released = 0  # characters of the text without an item yet
        self._at_start = True

    def take(self, delta: Delta) -> list[Item]:
        """Add a token and the text that was released with it; returns the items whose text is complete now."""
        own = delta.logprob
        if own is not None:
            text = self._decoder.decode(own.data)
            self._open.append(Item(text, own.data, max(own.logprob, MIN_LOGPROB), delta.top))
            if text and not self._decoder.getstate()[0]:
                self._close_group()
        items: list[Item] = []
        if delta.text:
            self._drop_hidden(delta.text)
            self.release(delta.text)
            while self._groups and (length := _length(self._groups[0])) <= self._num_released:
                self._num_released -= length
                items += self._groups.popleft()
        if delta.pieces:  # what was not released is not content, such as the markers of a call
            items += self.finish()
            self._num_released = 0
        return items

    def _drop_hidden(self, text: str) -> None:
        """Drop the tokens of markers, and white space around them, which are not part of the text."""
        if self._num_released:
            return
        waiting = "".join(item.text for group in self._groups for item in group)
        num_hidden = waiting.find(text)
        while num_hidden > 0:
            group = self._groups[0]
            if (length := _length(group)) <= num_hidden:
                self._groups.popleft()
                num_hidden -= length
                continue
            while num_hidden >= len(group[0].text):
                num_hidden -= len(group.pop(0).text)
            group[0].text, num_hidden = group[0].text[num_hidden:], 0
            group[0].data = group[0].text.encode()

    def release(self, text: str) -> None:
        """Record that `text` was released."""
        if self._at_start:
            self._drop_first_space(text)
        self._num_released += len(text)

    def finish(self) -> list[Item]:
        """The items of the remaining text, and of an incomplete character after it.

        An item that a stop string cuts is cut; those after it are dropped.
        """
        incomplete: list[Item] = []
        if self._open:
            num_chars = sum(_length(group) for group in [*self._groups, self._open])
            if num_chars == self._num_released:  # all text was released: no stop string cut it
                self._decoder.reset()
                self._num_released -= _length(self._open)
                incomplete, self._open = self._open, []
            else:
                # A worker of an older version releases U+FFFD for the incomplete character.
                self._open[-1].text += self._decoder.decode(b"", final=True)
                self._close_group()
        items: list[Item] = []
        for item in (item for group in self._groups for item in group):
            if not self._num_released:
                break
            item.text = item.text[: self._num_released]
            item.data = item.text.encode()
            self._num_released -= len(item.text)
            items.append(item)
        self._groups.clear()
        return items + incomplete

    def _close_group(self) -> None:
        group, self._open = self._open, []
        if b"".join(item.data for item in group) != "".join(item.text for item in group).encode():
            for item in group:  # invalid bytes became U+FFFD in the text
                item.data = item.text.encode()
        self._groups.append(group)

    def _drop_first_space(self, text: str) -> None:
        """Sentencepiece begins each text with a space, which a worker drops after a chat template."""
        self._at_start = False
        first = next((item for group in [*self._groups, self._open] for item in group if item.text), None)
        if first is not None and first.text.startswith(" ") and not text.startswith(" "):
            first.text = first.text[1:]
            first.data = first.text.encode()


def echoed_items(echo: Echo) -> list[Item]:
    """The items of an echoed prompt; none if its log-probabilities were not reported."""
    aligner, items = LogprobAligner(), []
    for token, top in zip(echo.tokens, echo.tops, strict=True):
        items += aligner.take(Delta(0, token.token_id, "", token, top))
    aligner.release(echo.text)
    items += aligner.finish()
    if items:
        items[0].logprob = None
    return items


def _length(group: list[Item]) -> int:
    return sum(len(item.text) for item in group)


def _top_token(token: TokenLogprob) -> dict[str, Any]:
    return {
        "token": token.data.decode("utf-8", "replace"),
        "logprob": max(token.logprob, MIN_LOGPROB),
        "bytes": list(token.data),
    }


def chat_items(items: list[Item]) -> list[dict[str, Any]]:
    """As in `logprobs.content` of a chat completion."""
    return [
        {
            "token": item.text,
            "logprob": item.logprob,
            "bytes": list(item.data),
            "top_logprobs": [_top_token(token) for token in item.top],
        }
        for item in items
    ]


def legacy_arrays(items: list[Item], start: int) -> dict[str, list[Any]]:
    """As in `logprobs` of a completion.

    Args:
        start: Characters of the answer before the first item.
    """
    offsets = []
    for item in items:
        offsets.append(start)
        start += len(item.text)
    return {
        "tokens": [item.text for item in items],
        "token_logprobs": [item.logprob for item in items],
        # OpenAI: the sampled token is included even if it is not among the most likely.
        "top_logprobs": [
            None
            if item.logprob is None
            else {_key(token.data): max(token.logprob, MIN_LOGPROB) for token in item.top}
            | {item.text or _key(item.data): item.logprob}
            for item in items
        ],
        "text_offset": offsets,
    }


def _key(data: bytes) -> str:
    """A token as a key. Incomplete characters are written as OpenAI does, so that keys are unique."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
