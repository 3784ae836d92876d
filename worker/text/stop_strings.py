"""Stop strings and other markers, found in text wherever token borders fall.

The generation loop feeds each row's text through one `StopMatcher`; what reads an answer's format finds its markers with
others. What could be the start of a marker is held back until it is one or is not; a marker itself never comes out.
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
        self._firsts = {stop[0] for stop in self._stops}
        self._held = ""

    @property
    def is_holding(self) -> bool:
        """Whether text is held back that may come out yet."""
        return bool(self._held)

    def feed(self, text: str) -> tuple[str, bool]:
        """Take more text.

        Returns:
            The text that is certain now (may be empty), and whether a stop string ended it; after that, no more is fed.
        """
        if not self._stops:
            return text, False
        certain, stop, _ = self.split(text)
        return certain, stop is not None

    def split(self, text: str) -> tuple[str, str | None, str]:
        """Take more text, of which there may be some behind the stop string.

        Returns:
            The text that is certain now, the stop string that ended it, and what follows that; more may be fed then.
        """
        buffer = self._held + text
        found = [
            (start + len(stop), start, stop) for stop in self._stops if (start := buffer.find(stop)) >= 0
        ]
        if found:
            self._held = ""
            end, start, stop = min(found)
            return buffer[:start], stop, buffer[end:]
        keep = self._possible_start(buffer)
        self._held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep], None, ""

    def flush(self) -> str:
        """What was held back, once no more text comes: it only looked like a stop string."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, buffer: str) -> int:
        """Length of the longest end of `buffer` that a stop string starts with."""
        tail = buffer[-(self._longest - 1) :] if self._longest > 1 else ""
        for position, char in enumerate(tail):
            if char in self._firsts and any(stop.startswith(tail[position:]) for stop in self._stops):
                return len(tail) - position
        return 0
