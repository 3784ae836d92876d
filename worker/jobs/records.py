"""What other processes wrote of a job, read with care: whoever can write to Redis can write anything.

Used by intake and takeover. What cannot be read is a `ForeignJobError`, whatever library tripped over it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
import redis

from common.protocol import Event, Failed, Finished, decode_event
from common.rq import ForeignJobError, JsonJob

CRASHES_FIELD = "mlxpool_strikes"
"""A field beside RQ's in a job's hash: how many workers in a row died with it without a new token of it."""

LAST_N_FIELD = "mlxpool_last_n"
"""Another: the last n of its journal when it was last taken over."""

POISON_CANDIDATE_CRASHES = 2


class CrashCount(NamedTuple):
    """What stands against a job: see CRASHES_FIELD and LAST_N_FIELD."""

    num: int = 0
    last_n: int = 0

    @property
    def is_poison_candidate(self) -> bool:
        """Whether it is tried alone. Once may be anything, such as a power cut."""
        return self.num >= POISON_CANDIDATE_CRASHES

    def after_death(self, last_n: int) -> CrashCount:
        """One more, unless the job had got on: what kills a worker at once is not the one that has run for minutes."""
        return CrashCount(1 if last_n > self.last_n else self.num + 1, last_n)


def read_crash_count(fields: dict[bytes, bytes]) -> CrashCount:
    """From a job's hash; nothing stands against one that was never taken over, or whose fields are no numbers."""
    try:
        return CrashCount(
            int(fields.get(CRASHES_FIELD.encode(), 0)), int(fields.get(LAST_N_FIELD.encode(), 0))
        )
    except ValueError:
        return CrashCount()


def restored(job_id: str, fields: dict[bytes, bytes], connection: redis.Redis) -> JsonJob:
    """The job of a hash.

    Raises:
        ForeignJobError: It is not the hash of a job, or not under the id of one.
    """
    try:
        job = JsonJob(job_id, connection=connection)
        job.restore(fields)
    except Exception as error:
        raise ForeignJobError(f"its hash cannot be read ({type(error).__name__}: {error})") from error
    return job


def read_journal(entries: list[Any]) -> list[Event]:
    """The events of XRANGE's or XREVRANGE's answer, in its order.

    Raises:
        ForeignJobError: One of them is none.
    """
    try:
        return [decode_event(fields[b"d"]) for _, fields in entries]
    except (msgspec.MsgspecError, UnicodeDecodeError, KeyError) as error:
        raise ForeignJobError(f"its journal cannot be read ({error})") from error


def has_ended(events: list[Event]) -> bool:
    """Whether there is a terminal event."""
    return any(isinstance(event, Finished | Failed) for event in events)
