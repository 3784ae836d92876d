"""One job's events, in order and each exactly once, whatever happens to the connection or the client.

Fed by the relay as messages arrive, emptied by the request's handler. Holds a bounded number of events: what a slow client
has not taken, and what never arrived, is read from the job's journal. Must not know HTTP.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable

import msgspec
import redis

from common.protocol import Delta, Event, Failed, Finished, Started

JournalReader = Callable[[str, int, int], Awaitable[list[Event]]]
"""(job id, first n, maximum number of events) to the journal's events from that n on."""

RETRY_SECONDS = 0.25
MAX_EMPTY_READS = 40
"""Reads of the journal without a published event, after which the event counts as lost."""

_LOST = Failed(0, "Part of the answer was lost.", code="answer_lost")


class Subscription:
    """See the module.

    Args:
        channel: Where the relay receives the job's events.

    Attributes:
        num_tokens: Tokens received, taken or not.
        terminal: The last event, once it is among those taken or waiting.
        is_aborted: Whether it came from this process and not from the job, which may still be queued or running.
        last_event_mono: The event loop's clock at the last event; infinite before the job is in the queue.
    """

    __slots__ = (
        "_empty_reads",
        "_events",
        "_is_behind",
        "_is_started",
        "_last_seen_n",
        "_max_events",
        "_next_n",
        "_read_journal",
        "_verdict",
        "_waiter",
        "channel",
        "is_aborted",
        "job_id",
        "last_event_mono",
        "num_tokens",
        "terminal",
    )

    def __init__(self, job_id: str, read_journal: JournalReader, max_events: int, channel: str = "") -> None:
        self.job_id = job_id
        self.channel = channel
        self.num_tokens = 0
        self.last_event_mono = math.inf
        self.is_aborted = False
        self.terminal: Finished | Failed | None = None
        self._read_journal = read_journal
        self._max_events = max_events
        self._events: list[Event] = []
        self._next_n = 1
        self._last_seen_n = 0
        self._is_behind = False
        self._empty_reads = 0
        self._is_started = False
        self._verdict: Failed | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def has_started(self) -> bool:
        """Whether a worker has published anything."""
        return self._is_started or self._next_n > 1

    def offer(self, event: Event) -> None:
        """Accept an event that was published.

        1. The next one is kept.
        2. One that was seen before is dropped: a second `Started` after a takeover, a repeated message.
        3. After a gap, or with a full buffer, only its n is kept: the journal has it.
        """
        n = event.n
        if self.terminal is not None:
            return
        if n == self._next_n and not self._is_behind and len(self._events) < self._max_events:
            self._accept(event)
        elif n >= self._next_n:
            self._last_seen_n = max(self._last_seen_n, n)
            self.read_journal_next()
        elif n == 0 and not self._is_started and self._next_n == 1 and isinstance(event, Started):
            self._is_started = True
            self._events.append(event)
            self.wake()

    def read_journal_next(self, verdict: Failed | None = None) -> None:
        """Events may have been missed: the next `take` reads the journal.

        Args:
            verdict: How the request ends if the journal has no terminal event.
        """
        if self.terminal is None:
            self._is_behind = True
            self._verdict = verdict or self._verdict
            self.wake()

    def wake(self) -> None:
        """Let `take` return, even without events."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def abort(self, failed: Failed) -> None:
        """End here, whatever the job does; later events are dropped."""
        if self.terminal is None:
            self.terminal = msgspec.structs.replace(failed, n=self._next_n)
            self.is_aborted = True
            self._events.append(self.terminal)
            self.wake()

    async def take(self) -> list[Event]:
        """Wait for events; empty on a tick of the clock.

        Must not be called after the terminal event was taken.
        """
        if not self._events:
            if self._is_behind:
                await self._catch_up()
            else:
                self._waiter = asyncio.get_running_loop().create_future()
                try:
                    await self._waiter
                finally:
                    self._waiter = None
        events, self._events = self._events, []
        return events

    def _accept(self, event: Event) -> None:
        self._events.append(event)
        self._next_n += 1
        if isinstance(event, Delta):
            self.num_tokens += 1
        elif isinstance(event, Finished | Failed):
            self.terminal = event
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _catch_up(self) -> None:
        """Read the journal from the next n on; what is published meanwhile is read the next time."""
        verdict = self._verdict
        try:
            events = await self._read_journal(self.job_id, self._next_n, self._max_events)
        except (redis.RedisError, OSError):
            await asyncio.sleep(RETRY_SECONDS)
            return
        before = self._next_n
        for event in events:
            if event.n == self._next_n and self.terminal is None:
                self._accept(event)
        if self._next_n > before:
            self._empty_reads = 0
        if self.terminal is not None or len(events) >= self._max_events:
            return
        if verdict is not None:
            self.abort(verdict)
        elif self._last_seen_n < self._next_n:
            self._is_behind = False
        elif self._next_n == before:
            await self._wait_for_entry()

    async def _wait_for_entry(self) -> None:
        """The journal lacks a published event: it expired, or Redis lost its last writes."""
        self._empty_reads += 1
        if self._empty_reads >= MAX_EMPTY_READS:
            self.abort(_LOST)
        else:
            await asyncio.sleep(RETRY_SECONDS)
