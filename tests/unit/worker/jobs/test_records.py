"""Records of other processes: what is no number, or no event, is treated as such and raises nothing else."""

from __future__ import annotations

import pytest
import redis

from common.rq import MAX_NUMBER, ForeignJobError
from worker.jobs.records import (
    CrashCount,
    guard_against_job,
    read_crash_count,
    read_journal,
    read_min_context,
    restore_job,
)


@pytest.mark.parametrize("text", [b"9" * 4300, b"9" * 5000, b"-1", b"x", b"%d" % (MAX_NUMBER + 1)])
def test_numbers_out_of_range(text: bytes) -> None:
    """A count that is no number in range is as good as missing: arithmetic on it stays small."""
    assert read_crash_count({b"mlxpool_strikes": text}) == CrashCount()
    assert read_crash_count({b"mlxpool_last_n": text}) == CrashCount()
    assert read_min_context({b"mlxpool_min_context": text}) == 0


def test_numbers_in_range() -> None:
    """The limit itself is still read."""
    fields = {b"mlxpool_strikes": b"2", b"mlxpool_last_n": b"%d" % MAX_NUMBER, b"mlxpool_min_context": b"101"}
    assert read_crash_count(fields) == CrashCount(2, MAX_NUMBER)
    assert read_min_context(fields) == 101


@pytest.mark.parametrize(
    "data", [b"[" * 100_000, b'["x",1,"m",500,"k",0,0,' + b"[" * 100_000, b"\xff", b"{}"]
)
def test_no_events(data: bytes) -> None:
    """Neither nesting nor bad text in a journal raises anything but `ForeignJobError`."""
    with pytest.raises(ForeignJobError, match="journal"):
        read_journal([(b"1-0", {b"d": data})])


@pytest.mark.parametrize("name", ["timeout", "result_ttl", "failure_ttl", "ttl", "retries_left"])
@pytest.mark.parametrize("text", [b"9" * 21, b"9" * 4300, b"-2"])
def test_jobs_with_numbers_out_of_range(name: str, text: bytes) -> None:
    """RQ adds to these numbers, and Redis and the protocol encoder have limits for them."""
    with redis.Redis() as client, pytest.raises(ForeignJobError):
        restore_job("a", {b"data": b"[]", name.encode(): text}, client)


@pytest.mark.parametrize("text", [b"5", b"[[1]]", b'["\\ud800"]', b'["a"]', b"[" * 100_000])
def test_jobs_with_dependencies(text: bytes) -> None:
    """No job of the API depends on another."""
    with redis.Redis() as client, pytest.raises(ForeignJobError):
        restore_job("a", {b"data": b"[]", b"dependency_ids": text}, client)


def test_guard_lets_errors_of_redis_through() -> None:
    """Only errors that a job causes are the job's own: a connection that is lost concerns all."""
    for error in (redis.ConnectionError(), redis.TimeoutError(), redis.ResponseError()):
        with pytest.raises(type(error)), guard_against_job():
            raise error
    for own_error in (TypeError(), redis.DataError(), UnicodeError(), RecursionError()):
        with pytest.raises(ForeignJobError), guard_against_job():
            raise own_error
