"""What other processes wrote about a job, validated: anyone who can write to Redis can write anything.

Used by intake and takeover. Whatever cannot be read is a `ForeignJobError`, whichever library failed on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import redis

from common import retention
from common.protocol import Event, Failed, Finished, decode_event
from common.rq import MAX_NUMBER, ForeignJobError, JsonJob

CRASHES_FIELD = "mlxpool_strikes"
"""Field next to RQ's in a job's hash: how many workers in a row died with the job and without a new token of it."""

LAST_N_FIELD = "mlxpool_last_n"
"""Field next to RQ's: the last n of the job's journal when it was last taken over."""

MIN_CONTEXT_FIELD = "mlxpool_min_context"
"""Field next to RQ's: the context length that the job needs at least, known from workers for which it was too long."""

POISON_CANDIDATE_CRASHES = 2


class CrashCount(NamedTuple):
    """A job's record of worker deaths, see CRASHES_FIELD and LAST_N_FIELD."""

    num: int = 0
    last_n: int = 0

    @property
    def is_poison_candidate(self) -> bool:
        """Whether the job is to run alone. A single crash may have any cause, such as a power cut."""
        return self.num >= POISON_CANDIDATE_CRASHES

    def after_death(self, last_n: int) -> CrashCount:
        """The record after one more death; it restarts at 1 if the job has new tokens, since it did not crash its worker at once."""
        return CrashCount(1 if last_n > self.last_n else self.num + 1, last_n)


def read_crash_count(fields: dict[bytes, bytes]) -> CrashCount:
    """Read a job's hash; a job that was never taken over, or whose fields are not numbers, has no crashes."""
    try:
        return CrashCount(_read_number(fields, CRASHES_FIELD), _read_number(fields, LAST_N_FIELD))
    except ValueError:
        return CrashCount()


def read_min_context(fields: dict[bytes, bytes]) -> int:
    """Read a job's hash; 0 if nothing is known, or the field is not a number."""
    try:
        return _read_number(fields, MIN_CONTEXT_FIELD)
    except ValueError:
        return 0


def _read_number(fields: dict[bytes, bytes], name: str) -> int:
    """A field of a job's hash; 0 if it is missing.

    Raises:
        ValueError: It is not a number, or out of range.
    """
    number = int(fields.get(name.encode(), 0))
    if not 0 <= number <= MAX_NUMBER:
        raise ValueError(f"{name} is out of range")
    return number


@contextmanager
def guard_against_job() -> Iterator[None]:
    """Turn what a job's data makes any library raise into a `ForeignJobError`, so that only this job is affected.

    Raises:
        ForeignJobError: The job cannot be handled.
        redis.RedisError: Redis is away or refuses a command.
    """
    try:
        yield
    except (ForeignJobError, redis.ConnectionError, redis.TimeoutError, redis.ResponseError):
        raise
    except Exception as error:
        raise ForeignJobError(f"it cannot be handled ({type(error).__name__}: {error})") from error


def restore_job(job_id: str, fields: dict[bytes, bytes], connection: redis.Redis) -> JsonJob:
    """Restore a job from its hash.

    Raises:
        ForeignJobError: It is not the hash of a job, or the id is invalid.
    """
    try:
        job = JsonJob(job_id, connection=connection)
        job.restore(fields)
    except ForeignJobError:
        raise
    except Exception as error:
        raise ForeignJobError(f"its hash cannot be read ({type(error).__name__}: {error})") from error
    return job


def read_journal(entries: list[Any]) -> list[Event]:
    """Decode the reply of XRANGE or XREVRANGE, in its order.

    Raises:
        ForeignJobError: An entry is not an event.
    """
    try:
        return [decode_event(fields[b"d"]) for _, fields in entries]
    except Exception as error:  # such as a RecursionError
        raise ForeignJobError(f"its journal cannot be read ({type(error).__name__}: {error})") from error


def cancellation(job: JsonJob) -> retention.Command | None:
    """The command that cancels a job which no worker runs, if its answer is stored; None otherwise, or if the job cannot be decoded."""
    try:
        request = job.request()
    except ForeignJobError:
        return None
    if request.answer_id is None or request.final_ttl_seconds is None:
        return None
    return retention.cancel(
        request.answer_id, request.job_id, request.final_ttl_seconds, channel=request.channel
    )


def has_ended(events: list[Event]) -> bool:
    """Whether one of the events is terminal."""
    return any(isinstance(event, Finished | Failed) for event in events)
