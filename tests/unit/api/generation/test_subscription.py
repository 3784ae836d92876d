"""A subscription delivers each event once and in order, even if messages are lost, repeated or late."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from api.generation.events import subscription as module
from api.generation.events.subscription import Subscription
from common.protocol import Delta, Event, Failed, Finished, Started, Usage

NUM_TOKENS = 10
END = Finished(NUM_TOKENS + 1, "stop", Usage(1, NUM_TOKENS))
ALL: list[Event] = [*(Delta(n, n, f" {n}") for n in range(1, NUM_TOKENS + 1)), END]
PATIENCE_SECONDS = 10
VERDICT = Failed(0, "gone", status=503)


class Journal:
    """A journal whose reader can fail."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.failures = 0
        self.num_reads = 0

    async def read(self, _job_id: str, first_n: int, most: int) -> list[Event]:
        self.num_reads += 1
        if self.failures:
            self.failures -= 1
            raise redis.ConnectionError("away")
        return [event for event in self.events if event.n >= first_n][:most]


def play(coroutine: Callable[[Journal], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(coroutine(Journal()), PATIENCE_SECONDS))


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0)


async def take_all(subscription: Subscription) -> list[Event]:
    """All events up to the terminal one."""
    taken: list[Event] = []
    while subscription.terminal is None or subscription.terminal not in taken:
        taken += await subscription.take()
    return taken


def test_events_in_order() -> None:
    """Events that arrive in order are delivered in order, Started first."""

    async def run(journal: Journal) -> None:
        subscription = Subscription("j", journal.read, 100)
        for event in [Started(0, 5), *ALL]:
            subscription.offer(event)
        assert await subscription.take() == [Started(0, 5), *ALL]
        assert subscription.terminal == END
        assert (subscription.num_tokens, subscription.is_aborted, journal.num_reads) == (
            NUM_TOKENS,
            False,
            0,
        )

    play(run)


def test_duplicates_are_dropped() -> None:
    """A repeated event, a second Started after a takeover, anything after the end: none is delivered."""

    async def run(journal: Journal) -> None:
        subscription = Subscription("j", journal.read, 100)
        for event in [Started(0, 5), ALL[0], ALL[0], Started(0, 5), *ALL, *ALL, Failed(NUM_TOKENS + 2, "x")]:
            subscription.offer(event)
        assert await subscription.take() == [Started(0, 5), *ALL]

    play(run)


def test_a_gap_is_read_from_the_journal() -> None:
    """No event after a gap is delivered before those in it."""

    async def run(journal: Journal) -> None:
        journal.events = ALL[:6]
        subscription = Subscription("j", journal.read, 100)
        subscription.offer(ALL[0])
        subscription.offer(ALL[4])
        assert await subscription.take() == ALL[:1]
        assert await subscription.take() == ALL[1:6]
        subscription.offer(ALL[6])
        assert await subscription.take() == ALL[6:7]
        assert journal.num_reads == 1

    play(run)


def test_events_published_while_the_journal_is_read() -> None:
    """They are dropped but detected, and read next; also if they include the end."""

    async def run(journal: Journal) -> None:
        subscription = Subscription("j", journal.read, 100)

        async def read(job_id: str, first_n: int, most: int) -> list[Event]:
            events = await journal.read(job_id, first_n, most)
            journal.events = ALL
            subscription.offer(END)
            return events

        subscription = Subscription("j", read, 100)
        journal.events = ALL[:3]
        subscription.read_journal_next()
        assert await take_all(subscription) == ALL

    play(run)


def test_memory_is_bounded_for_a_slow_client() -> None:
    """Events beyond its buffer are dropped, and read from the journal in batches of that size."""

    async def run(journal: Journal) -> None:
        journal.events = ALL
        subscription = Subscription("j", journal.read, 4)
        for event in ALL:
            subscription.offer(event)
        pieces = []
        while subscription.terminal is None:
            pieces.append(await subscription.take())
        assert [len(piece) for piece in pieces] == [4, 4, 3]
        assert [event for piece in pieces for event in piece] == ALL

    play(run)


def test_a_redis_outage_is_waited_out() -> None:
    """A journal that cannot be read now is read later; meanwhile the handler is woken."""

    async def run(journal: Journal) -> None:
        journal.events, journal.failures = ALL, 2
        subscription = Subscription("j", journal.read, 100)
        subscription.read_journal_next()
        assert [await subscription.take(), await subscription.take()] == [[], []]
        assert await subscription.take() == ALL

    play(run)


def test_the_journal_overrules_a_verdict() -> None:
    """A job that has ended by its status ends as in its journal; the verdict counts only if the journal has no end."""

    async def run(journal: Journal) -> None:
        journal.events = ALL
        told = Subscription("j", journal.read, 100)
        told.read_journal_next(VERDICT)
        assert await take_all(told) == ALL
        assert not told.is_aborted
        journal.events = ALL[:2]
        untold = Subscription("j", journal.read, 100)
        untold.read_journal_next(VERDICT)
        assert await take_all(untold) == [*ALL[:2], Failed(3, "gone", status=503)]
        assert untold.is_aborted
        assert untold.num_tokens == 2

    play(run)


def test_an_event_that_is_lost_for_good_ends_the_answer() -> None:
    """A journal that lacks a published event is not read forever."""

    async def run(journal: Journal) -> None:
        subscription = Subscription("j", journal.read, 100)
        subscription.offer(ALL[0])
        subscription.offer(ALL[5])
        taken = await take_all(subscription)
        assert taken[0] == ALL[0]
        assert isinstance(taken[1], Failed)
        assert taken[1].n == 2
        assert journal.num_reads == module.MAX_EMPTY_READS

    play(run)


def test_a_wait_can_be_woken_without_events() -> None:
    """The handler then checks its clock."""

    async def run(journal: Journal) -> None:
        subscription = Subscription("j", journal.read, 100)
        taking = asyncio.create_task(subscription.take())
        await asyncio.sleep(0)
        subscription.wake()
        assert await taking == []

    play(run)


def test_a_wait_can_be_cancelled() -> None:
    """The next take returns the events that arrived since."""

    async def run(journal: Journal) -> None:
        subscription = Subscription("j", journal.read, 100)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await subscription.take()
        subscription.offer(ALL[0])
        assert await subscription.take() == ALL[:1]

    play(run)


@given(data=st.data())
def test_any_disorder_gives_the_same_answer(data: st.DataObject) -> None:
    """For any loss, repetition and reordering of messages, reconnects and slowness: each event once, in order."""

    async def run(journal: Journal) -> None:
        subscription = Subscription("j", journal.read, data.draw(st.integers(1, 5), label="buffer"))
        taken: list[Event] = []
        for event in ALL:
            journal.events.append(event)
            for offered in data.draw(st.lists(st.sampled_from(journal.events), max_size=3), label="offered"):
                subscription.offer(offered)
            if data.draw(st.booleans(), label="reconnect"):
                subscription.read_journal_next()
            subscription.wake()
            if data.draw(st.booleans(), label="take") and subscription.terminal is None:
                taking = asyncio.create_task(subscription.take())
                await asyncio.sleep(0)
                subscription.wake()
                taken += await taking
        subscription.read_journal_next()
        while END not in taken:
            taken += await subscription.take()
        assert taken == ALL

    play(run)
