"""Events of several choices in an order that their journals determine, so that a stream's bytes can be made again.

Used by `Choices` for resumable requests: the first event of each choice, then the second of each, and so on. Other requests
keep the order of arrival, in which no choice waits for another one. Independent of where events come from.
"""

from __future__ import annotations

from collections import deque

from common.protocol import Event, Failed, Finished


class ChoiceOrder:
    """See the module.

    Args:
        num_choices: At least one.
    """

    def __init__(self, num_choices: int) -> None:
        self._waiting: list[deque[Event]] = [deque() for _ in range(num_choices)]
        self._is_ended = [False] * num_choices
        self._open = list(range(num_choices))  # choices whose terminal event was not popped
        self._turn = 0  # index in `_open` of the choice whose event comes next

    def needs(self, index: int) -> bool:
        """Whether further events of a choice should be taken: it has none waiting. This bounds what a fast choice collects."""
        return not self._waiting[index] and not self._is_ended[index]

    def add(self, index: int, events: list[Event]) -> None:
        """The next events of a choice, as they are numbered in its journal."""
        self._waiting[index].extend(events)
        if events and isinstance(events[-1], Finished | Failed):
            self._is_ended[index] = True

    def pop(self) -> list[tuple[int, list[Event]]]:
        """The events whose turn it is, in order; nothing follows an event that ends the request."""
        popped: list[tuple[int, list[Event]]] = []
        while self._open and self._waiting[index := self._open[self._turn]]:
            event = self._waiting[index].popleft()
            popped.append((index, [event]))
            if isinstance(event, Failed) or (
                isinstance(event, Finished) and event.finish_reason == "cancelled"
            ):
                self._open.clear()
                break
            if isinstance(event, Finished):
                self._open.remove(index)
            else:
                self._turn += 1
            if self._turn >= len(self._open):
                self._turn = 0
        return popped
