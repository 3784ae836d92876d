"""Stop strings, found in text wherever token borders fall.

The generation loop feeds each row's text through one `StopMatcher`. What could be the start of a stop string is held back
until it is one or is not; a stop string itself never comes out.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Looks for the first stop string to be completed; the outcome does not depend on how the text was cut.

    Where several end at the same character, the one that starts first wins.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Take more text.

        Returns:
            The text that is certain now (may be empty), and whether a stop string ended it; after that, no more is fed.
        """
        if not self._stops:
            return text, False
        buffer = self._held + text
        ends = [(start + len(stop), start) for stop in self._stops if (start := buffer.find(stop)) >= 0]
        if ends:
            self._held = ""
            return buffer[: min(ends)[1]], True
        keep = self._possible_start(buffer)
        self._held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep], False

    def flush(self) -> str:
        """What was held back, once no more text comes: it only looked like a stop string."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, buffer: str) -> int:
        """Length of the longest end of `buffer` that a stop string starts with."""
        for length in range(min(self._longest - 1, len(buffer)), 0, -1):
            end = buffer[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
