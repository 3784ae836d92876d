"""Who sends a step: the generation thread a small one, the journal's thread a large one, and neither before the other is done."""

from __future__ import annotations

import threading

import pytest
import redis

from common.protocol import Delta, encode
from tests.unit.scripted import ScriptedJournal
from worker.background_journal import BackgroundJournal
from worker.journal import Receipt, Row


class Recording(ScriptedJournal):
    """Remembers who called."""

    def __init__(self) -> None:
        super().__init__()
        self.senders: list[str] = []
        self.error: Exception | None = None

    def send(self, rows: list[Row]) -> None:
        self.senders.append(threading.current_thread().name)
        super().send(rows)

    def collect(self) -> Receipt:
        receipt = super().collect()
        if self.error is not None:
            raise self.error
        return receipt


def _step(num_rows: int, n: int) -> list[Row]:
    return [Row("c", f"job-{i}", "execution", n, encode(Delta(n, n, "x"))) for i in range(num_rows)]


def test_large_and_small_steps_take_turns() -> None:
    """All steps are written in their order, each answer is its own step's, and only the large ones cross threads."""
    inner = Recording()
    journal = BackgroundJournal(inner, large_rows=3)
    for n, num_rows in enumerate((4, 2, 3, 3, 1, 4), start=1):
        inner.num_listeners = n
        journal.send(
            _step(num_rows, len(inner.entries.get("job-3", [])) + 1) if num_rows == 4 else _new(n, num_rows)
        )
        assert journal.collect() == Receipt(set(), {"c": n})
    own = threading.current_thread().name
    assert inner.senders == ["journal", own, "journal", "journal", own, "journal"]
    journal.close()


def _new(n: int, num_rows: int) -> list[Row]:
    return [Row("c", f"job-{n}-{i}", "execution", 1, encode(Delta(1, 1, "x"))) for i in range(num_rows)]


def test_its_error_is_raised_where_it_is_waited_for() -> None:
    """A Redis that nobody waits for any more ends the loop's wait, as it does without the thread."""
    inner = Recording()
    inner.error = redis.ConnectionError("gone")
    journal = BackgroundJournal(inner, large_rows=1)
    journal.send(_step(2, 1))
    with pytest.raises(redis.ConnectionError, match="gone"):
        journal.collect()
    inner.error = None
    journal.send(_step(2, 2))
    assert journal.collect() == Receipt(set(), {"c": 1})
    journal.close()
