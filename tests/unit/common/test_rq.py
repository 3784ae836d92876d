"""RQ's classes as this project uses them, without Redis: what is decompressed has a limit."""

from __future__ import annotations

import base64
import json
import tracemalloc
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from rq.results import Result

from common import rq
from common.rq import ForeignJobError, JsonJob

BOMB_BYTES = 1 << 30


def make_bomb(num_bytes: int = BOMB_BYTES) -> bytes:
    """Compressed brackets. After a full flush a compressor starts afresh, so equal blocks compress to equal bytes."""
    compressor = zlib.compressobj()
    block = b"[" * (1 << 22)

    def compressed_block() -> bytes:
        return compressor.compress(block) + compressor.flush(zlib.Z_FULL_FLUSH)

    return compressed_block() + compressed_block() * (num_bytes // len(block) - 1)


@pytest.fixture(scope="module")
def bomb() -> bytes:
    """A megabyte that decompresses to a gigabyte."""
    return make_bomb()


@pytest.fixture
def client() -> Iterator[redis.Redis]:
    with redis.Redis() as unconnected:  # nothing is sent
        yield unconnected


def refused_within_memory(read: Any) -> bool:
    """Whether `read` raises `ForeignJobError` and allocates no more than the limit allows."""
    tracemalloc.start()
    try:
        with pytest.raises(ForeignJobError, match="larger than"):
            read()
        return tracemalloc.get_traced_memory()[1] < 3 * rq.MAX_JOB_BYTES  # the buffer grows by doubling
    finally:
        tracemalloc.stop()


def test_zip_bombs_are_refused(client: redis.Redis, bomb: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gigabyte in a job's data, in its exception or in a result is refused without being decompressed completely."""
    assert len(bomb) < 2_000_000
    monkeypatch.setattr(rq, "MAX_JOB_BYTES", 8 << 20)  # the real limit takes seconds to fill
    data = {b"data": bomb}
    exception = {b"data": zlib.compress(b"[]"), b"exc_info": bomb}
    result: dict[bytes, bytes] = {b"type": b"2", b"exc_string": base64.b64encode(bomb)}
    assert refused_within_memory(lambda: JsonJob("a", client).restore(data))
    assert refused_within_memory(lambda: JsonJob("a", client).restore(exception))
    assert refused_within_memory(lambda: Result.restore("a", "1-0", result, client))


def test_limit_is_inclusive(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data of exactly the limit is read, one byte more is refused."""
    monkeypatch.setattr(rq, "MAX_JOB_BYTES", 100)
    job = JsonJob("a", client)
    job.restore({b"data": zlib.compress(b"x" * 100)})
    assert job.data == b"x" * 100
    with pytest.raises(ForeignJobError):
        job.restore({b"data": zlib.compress(b"x" * 101)})


def test_uncompressed_and_truncated_data_are_used_as_they_are(client: redis.Redis) -> None:
    """As RQ does: what zlib cannot decompress is the data itself."""
    truncated = zlib.compress(b"x" * 100)[:-1]
    for data in (b'["mlxpool.generate", null, [], {}]', truncated):
        job = JsonJob("a", client)
        job.restore({b"data": data})
        assert job.data == data


@pytest.mark.parametrize(("channel", "is_valid"), [("\ud800", False), ("\ud83d\ude00x", True), ("a", True)])
def test_text_that_cannot_be_encoded(client: redis.Redis, channel: str, is_valid: bool) -> None:
    """A surrogate without its pair makes a request invalid, since no reply to its channel could be sent; a pair does not."""
    request = {"job_id": "a", "model": "m", "channel": channel, "prompt": {"type": "text", "text": "x"}}
    job = JsonJob("a", client)
    job.restore({b"data": json.dumps(["mlxpool.generate", None, [], request]).encode()})
    if is_valid:
        assert job.request().job_id == "a"
    else:
        with pytest.raises(ForeignJobError, match="UnicodeEncodeError"):
            job.request()
