"""The events of a response's stream as frames, numbered in order.

Used by the output items and the rendering. A frame has its event's name, and repeats it as `type` in the data, as OpenAI's have.
"""

from __future__ import annotations

from typing import Any

import msgspec

from api.http import sse

_encode = msgspec.json.encode


class EventWriter:
    """Writes the events of one response.

    Attributes:
        next_number: The `sequence_number` of the next event.
    """

    def __init__(self) -> None:
        self.next_number = 0

    def event(self, name: str, fields: dict[str, Any]) -> bytes:
        """The next event."""
        return self.raw_event(name, _encode(fields))

    def raw_event(self, name: str, data: bytes) -> bytes:
        """The next event.

        Args:
            data: Its fields as a JSON object.
        """
        number, self.next_number = self.next_number, self.next_number + 1
        return frame(name, number, data)


def frame(name: str, number: int, data: bytes) -> bytes:
    """An event with its number.

    Args:
        data: Its fields as a JSON object that is not empty.
    """
    head = b'{"type":"%b","sequence_number":%d,' % (name.encode(), number)
    return sse.frame(head + data[1:], event=name)
