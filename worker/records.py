"""What other processes wrote of a job, read with care: whoever can write to Redis can write anything.

Used by intake and takeover. What cannot be read is a `ForeignJobError`, whatever library tripped over it.
"""

from __future__ import annotations

from typing import Any

import msgspec
import redis

from common.protocol import Event, Failed, Finished, decode_event
from common.rq import ForeignJobError, JsonJob


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
