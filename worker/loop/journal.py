"""The journal as the generation loop sees it: what it writes for each step, and what it learns from the reply.

`worker.jobs.redis_journal` implements it on Redis, tests in memory. Independent of Redis and RQ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec


class JournalEntry(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """One event of one job, to be appended to its journal and published; the script in `worker.jobs.redis_journal` reads the fields by position.

    Attributes:
        execution_id: The writer's lease; without it the entry is refused.
        n: The event's number in the journal, from 1; 0: published only.
        event: Encoded, see `common.protocol`. Text, which Lua's MessagePack can read; it cannot read bytes.
        ttl_seconds: The journal's new time to live; 0 leaves it unchanged.
    """

    channel: str
    job_id: str
    execution_id: str
    n: int
    event: str
    ttl_seconds: int = 0


class AppendResult(msgspec.Struct, frozen=True):
    """The reply to one `Journal.send`.

    Attributes:
        refused: Executions whose lease is lost, or whose journal another worker has continued.
        listeners: The number of subscribers of each channel that something was published to.
    """

    refused: set[str] = set()
    listeners: dict[str, int] = {}


class Journal(Protocol):
    """Appends and publishes without blocking: a step's entries are sent, the reply is collected one step later."""

    def send(self, entries: Sequence[JournalEntry]) -> None:
        """Send one step's entries; the previous call must have been collected."""

    def collect(self) -> AppendResult:
        """Wait for the reply to the last `send`; called exactly once for each."""
