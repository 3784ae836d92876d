"""Large steps are journaled by a thread of their own, while the generation thread begins the next step.

Made by `batch_worker` around the journal that writes; the generation loop sees a `Journal`. On a GPU the generation thread is
what limits: a decode step is Python and kernel launches, two thirds of it without the interpreter's lock, in which this
thread packs, sends and reads. A step of few rows is sent at once: handing it over would take longer than sending it.
"""

from __future__ import annotations

from collections.abc import Sequence
from queue import SimpleQueue

from worker.journal import Journal, Receipt, Row
from worker.watchdog import start_thread

LARGE_ROWS = 12


class BackgroundJournal:
    """`Journal` around another one; see the module.

    Args:
        large_rows: From how many rows on the thread does it.
    """

    def __init__(self, journal: Journal, large_rows: int = LARGE_ROWS) -> None:
        self._journal = journal
        self._large_rows = large_rows
        self._sent: SimpleQueue[list[Row] | None] = SimpleQueue()
        self._answered: SimpleQueue[Receipt | BaseException] = SimpleQueue()
        self._is_away = False
        start_thread("journal", self._run)

    def send(self, rows: Sequence[Row]) -> None:
        self._is_away = len(rows) >= self._large_rows
        if self._is_away:
            self._sent.put(list(rows))
        else:
            self._journal.send(rows)

    def collect(self) -> Receipt:
        """As `Journal.collect`.

        Raises:
            redis.RedisError: As the journal's own.
        """
        if not self._is_away:
            return self._journal.collect()
        self._is_away = False
        answer = self._answered.get()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def close(self) -> None:
        """End the thread, without waiting for it: while Redis is away it may take long."""
        self._sent.put(None)

    def _run(self) -> None:
        while (rows := self._sent.get()) is not None:
            try:
                self._journal.send(rows)
                self._answered.put(self._journal.collect())
            except BaseException as error:  # noqa: BLE001 (raised where it is waited for)
                self._answered.put(error)
