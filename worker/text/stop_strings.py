"""Finds stop strings and other markers in streamed text, also across tokens.

The generation loop feeds each sequence's text to one `StopMatcher`; `answer_parser` and `tool_calls` find their markers with others. Text that may
be the start of a marker is held back until it is certain; a marker itself is never released.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Finds the first stop string that is completed. The result does not depend on how the text was cut into pieces.

    If several end at the same character, the one that starts first wins. Empty strings stop nothing.

    Attributes:
        found: The stop string that ended the text fed last, or None.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = tuple(filter(None, stops))
        self._max_length = max(map(len, self._stops), default=0)
        self._first_chars = {stop[0] for stop in self._stops}
        self._held_text = ""
        self.found: str | None = None

    @property
    def is_holding(self) -> bool:
        """Whether text is held back that may still be released."""
        return bool(self._held_text)

    def feed(self, text: str) -> tuple[str, bool]:
        """Add text.

        Returns:
            The text that is certain now (may be empty), and whether a stop string ended it; do not feed more text then.
        """
        if not self._stops:
            return text, False
        certain, self.found, _ = self.split(text)
        return certain, self.found is not None

    def split(self, text: str) -> tuple[str, str | None, str]:
        """Add text, some of which may follow the stop string.

        Returns:
            The text that is certain now (may be empty), the stop string that ended it (or None), and the text after it (empty
            without a stop string). More text may be fed then.
        """
        buffer = self._held_text + text
        matches = [
            (start + len(stop), start, stop) for stop in self._stops if (start := buffer.find(stop)) >= 0
        ]
        if matches:
            self._held_text = ""
            end, start, stop = min(matches)
            return buffer[:start], stop, buffer[end:]
        keep = self._possible_start_length(buffer)
        self._held_text = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep], None, ""

    def flush(self) -> str:
        """Release the held-back text at the end: it is not a stop string."""
        held, self._held_text = self._held_text, ""
        return held

    def _possible_start_length(self, buffer: str) -> int:
        """Length of the longest suffix of `buffer` that is a prefix of a stop string."""
        tail = buffer[-(self._max_length - 1) :] if self._max_length > 1 else ""
        for position, char in enumerate(tail):
            if char in self._first_chars and any(stop.startswith(tail[position:]) for stop in self._stops):
                return len(tail) - position
        return 0
