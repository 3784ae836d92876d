"""Server-sent events as bytes: data frames, event names, comments and OpenAI's end mark.

The only file that spells the format (https://html.spec.whatwg.org/multipage/server-sent-events.html). Used by renderings,
which put frames together from parts they encode once. Must not know what the data means.
"""

from __future__ import annotations

DATA = b"data: "
"""What the data line of a frame begins with. The data is JSON, so it is one line."""

END = b"\n\n"
"""The end of a frame."""

DONE = DATA + b"[DONE]" + END
"""OpenAI's last frame of a stream."""

KEEP_ALIVE = b": keep-alive" + END
"""A comment, which clients skip."""


def frame(data: bytes, *, event: str | None = None) -> bytes:
    """One complete frame.

    Args:
        data: One line.
        event: The event's name; None: unnamed, which clients call ``message``.
    """
    name = b"" if event is None else b"event: " + event.encode() + b"\n"
    return name + DATA + data + END
