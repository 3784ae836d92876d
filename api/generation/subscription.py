"""One request's events, in order and each exactly once, whatever happens to the connection or to the client.

Fed by the relay as messages come, emptied by the request's handler. Holds a bounded number of events: what a slow client
does not take, and what never arrived, is read from the job's journal. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable

import msgspec
import redis

from common.protocol import Event, Failed, Finished, Started

JournalReader = Callable[[str, int, int], Awaitable[list[Event]]]
"""(job id, first n, most entries) to the journal's events from that n on."""

RETRY_SECONDS = 0.25
MAX_EMPTY_READS = 40
"""So often is the journal asked for an event that was published, before it counts as lost."""

_LOST = Failed(0, "A part of the answer was lost.", code="answer_lost")


class Subscription:
    """See the module.

    Attributes:
        terminal: The last event, once it is among those taken or waiting.
        is_given_up: Whether it came from here and not from the job, which may still be somewhere.
        heard_at: Event loop's clock when the last event came; infinite before the job is in the queue.
    """

    __slots__ = (
        "_empty_reads",
        "_events",
        "_has_started",
        "_is_behind",
        "_last_seen_n",
        "_max_events",
        "_next_n",
        "_read_journal",
        "_verdict",
        "_waiter",
        "heard_at",
        "is_given_up",
        "job_id",
        "terminal",
    )

    def __init__(self, job_id: str, read_journal: JournalReader, max_events: int) -> None:
        self.job_id = job_id
        self.heard_at = math.inf
        self.is_given_up = False
        self.terminal: Finished | Failed | None = None
        self._read_journal = read_journal
        self._max_events = max_events
        self._events: list[Event] = []
        self._next_n = 1
        self._last_seen_n = 0
        self._is_behind = False
        self._empty_reads = 0
        self._has_started = False
        self._verdict: Failed | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that came, whether they were taken or not."""
        return self._next_n - (1 if self.terminal is None or self.is_given_up else 2)

    @property
    def has_begun(self) -> bool:
        """Whether a worker was heard of."""
        return self._has_started or self._next_n > 1

    def offer(self, event: Event) -> None:
        """An event came over the wire.

        1. The next one is taken.
        2. One that was seen is dropped: a second `Started` after a takeover, a repeated message.
        3. After a gap, or with no room, only that it exists is kept: the journal has it.
        """
        n = event.n
        if self.terminal is not None:
            return
        if n == self._next_n and not self._is_behind and len(self._events) < self._max_events:
            self._accept(event)
        elif n >= self._next_n:
            self._last_seen_n = max(self._last_seen_n, n)
            self.look_in_journal()
        elif n == 0 and not self._has_started and self._next_n == 1 and isinstance(event, Started):
            self._has_started = True
            self._events.append(event)
            self.wake()

    def look_in_journal(self, verdict: Failed | None = None) -> None:
        """Something may have been missed.

        Args:
            verdict: How the job ends if its journal does not say that it ended.
        """
        if self.terminal is None:
            self._is_behind = True
            self._verdict = verdict or self._verdict
            self.wake()

    def wake(self) -> None:
        """Let `take` return, also with nothing."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def give_up(self, failed: Failed) -> None:
        """End here, whatever the job does; nothing that comes later counts."""
        if self.terminal is None:
            self.terminal = msgspec.structs.replace(failed, n=self._next_n)
            self.is_given_up = True
            self._events.append(self.terminal)
            self.wake()

    async def take(self) -> list[Event]:
        """Wait for events; empty when there may be something to do other than events (the time has moved on).

        Not to be called after the terminal event was taken.
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
        if isinstance(event, Finished | Failed):
            self.terminal = event
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _catch_up(self) -> None:
        """Read on in the journal; what is published meanwhile is noticed, and read the next time."""
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
            self.give_up(verdict)
        elif self._last_seen_n < self._next_n:
            self._is_behind = False
        elif self._next_n == before:
            await self._wait_for_entry()

    async def _wait_for_entry(self) -> None:
        """The journal lacks what was published: it expired, or Redis lost its last moments."""
        self._empty_reads += 1
        if self._empty_reads >= MAX_EMPTY_READS:
            self.give_up(_LOST)
        else:
            await asyncio.sleep(RETRY_SECONDS)
