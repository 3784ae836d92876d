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

ID = b"id: "
"""What the id line of a frame begins with."""

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


class FrameNumbers:
    """Gives each frame of a stream an id, `<stream id>:<number>` from 0, by which a client can resume after it.

    Args:
        skip: So many frames are dropped: the client has them.
    """

    def __init__(self, stream_id: str, skip: int = 0) -> None:
        self._start = ID + stream_id.encode() + b":"
        self._skip = skip
        self._next = 0

    def number(self, frames: bytes) -> bytes:
        """The next complete frames, with an id line before each."""
        if not frames:
            return frames
        if self._next >= self._skip:
            end = len(frames) - len(END)
            line_end = frames.find(b"\n")  # far faster than a search for two characters
            if line_end == end or frames.find(END, line_end) == end:  # one frame, the usual case
                self._next += 1
                return b"".join((self._start, b"%d\n" % (self._next - 1), frames))
        numbered = []
        for each in frames.split(END)[:-1]:
            if self._next >= self._skip:
                numbered.append(b"%b%d\n%b%b" % (self._start, self._next, each, END))
            self._next += 1
        return b"".join(numbered)
