"""Streams that are resumed: on any API process, byte for byte what was missed, and only by the key that began them."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from api import keys
from common import connections, names
from common.protocol import Delta, Event, Failed, Finished, GenerationJob, Started, TokenLogprob, Usage
from tests.e2e.api_pool import HI, MODEL, ApiPool, api_pool
from tests.e2e.resuming import StreamReader
from tests.redis.pool_of_workers import wait_until

CHAT, COMPLETIONS, RESPONSES, MESSAGES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
)
NUM_TOKENS = 40


def varied_tokens(job: GenerationJob) -> Iterator[Event | float]:
    """Each choice has tokens and a pace of its own; some tokens have no text, and some choices are slow."""
    n = 0
    if job.journals_started:
        n = 1
        yield Started(1, 5)
    for k in range(1, NUM_TOKENS + job.sampling.seed % 3):
        text = "" if k % 5 == 0 else f" {k}.{job.sampling.seed % 97}"
        own = TokenLogprob(k, -0.5, text.encode()) if job.top_logprobs is not None else None
        yield Delta(n + k, k, text, own)
        yield 0.001 * (job.sampling.seed % 7)
        n_last = n + k
    yield Finished(n_last + 1, "stop", Usage(5, n_last - n))


def slow(_job: GenerationJob) -> Iterator[Event | float]:
    """Long enough for a client to leave and come back."""
    for k in range(1, 21):
        yield Delta(k, k, f" {k}")
        yield 0.05
    yield Finished(21, "stop", Usage(5, 20))


def slower(_job: GenerationJob) -> Iterator[Event | float]:
    """Longer than the server takes to shut down."""
    for k in range(1, 21):
        yield Delta(k, k, f" {k}")
        yield 0.25
    yield Finished(21, "stop", Usage(5, 20))


def broken(_job: GenerationJob) -> Iterator[Event | float]:
    """Fails after a while."""
    yield Delta(1, 1, "a")
    yield 0.2
    yield Failed(2, "It broke.", code="broken")


@pytest.fixture(scope="module")
def running() -> Iterator[ApiPool]:
    """Two API processes, a small buffer, and comments in every pause."""
    settings = {
        "MLXPOOL_SSE_COMMENT_SECONDS": "0.5",
        "MLXPOOL_STREAM_BUFFER_EVENTS": "16",
        "MLXPOOL_REQUEST_SECONDS": "30",
    }
    with api_pool(settings, num_processes=2) as pool:
        yield pool


@pytest.fixture
def api(running: ApiPool) -> ApiPool:
    running.follow(varied_tokens)
    return running


def begin(
    api: ApiPool, path: str = CHAT, fields: dict[str, Any] | None = None, **headers: str
) -> StreamReader:
    """A resumable stream."""
    body = {"model": MODEL, "stream": True} | ({"messages": HI} if fields is None else fields)
    return StreamReader(
        api.pool.port, "POST", path, json.dumps(body).encode(), **{"x_resumable": "true"} | headers
    )


def resume(
    api: ApiPool, stream_id: str, last_id: str | None = None, query: str = "", **headers: str
) -> StreamReader:
    if last_id is not None:
        headers["last_event_id"] = last_id
    return StreamReader(api.pool.port, "GET", f"/v1/streams/{stream_id}{query}", **headers)


def error_of(reader: StreamReader) -> tuple[int, str, str | None]:
    """Status, code and parameter of a refusal."""
    with reader:
        error = json.loads(reader._reader.read(int(reader.headers["content-length"])))["error"]
    return reader.status, error["code"], error["param"]


REQUESTS: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": HI, "seed": 5}),
    (CHAT, {"messages": HI, "n": 3, "logprobs": True, "stream_options": {"include_usage": True}}),
    (COMPLETIONS, {"prompt": ["x", "y"], "n": 2}),
    (RESPONSES, {"input": "hi"}),
    (MESSAGES, {"messages": HI, "max_tokens": 100}),
]


@pytest.mark.parametrize(("path", "fields"), REQUESTS)
def test_every_rest_of_a_stream(api: ApiPool, path: str, fields: dict[str, Any]) -> None:
    """After any frame, by either way of naming it, while it is generated and when it is complete: exactly what follows."""
    with begin(api, path, fields) as first:
        stream_id = first.headers["x-stream-id"]
        first.read(3)
        with resume(api, stream_id, first.last_id) as early:
            early.read()
        whole = first.read()
    assert (first.status, first.unnumbered) == (200, [])
    assert [frame.split(b"\n")[0] for frame in first.frames] == [
        b"id: %b:%d" % (stream_id.encode(), k) for k in range(len(first.frames))
    ]
    assert early.frames == first.frames[3:]
    num_frames = len(first.frames)
    assert num_frames > NUM_TOKENS // 2
    for k in {0, 1, num_frames // 2, num_frames - 2, num_frames - 1}:
        with resume(api, stream_id, f"{stream_id}:{k}") as by_header:
            assert by_header.read() == b"".join(first.frames[k + 1 :])
        with resume(api, stream_id, query=f"?starting_after={k}") as by_query:
            assert by_query.read() == b"".join(first.frames[k + 1 :])
        assert by_header.unnumbered == by_query.unnumbered == []
    with resume(api, stream_id) as again:
        assert again.read() == whole
    assert again.headers["content-type"] == first.headers["content-type"]
    assert again.headers["x-stream-id"] == stream_id


def test_a_client_that_leaves_and_comes_back(api: ApiPool) -> None:
    """Its job is not cancelled. Several clients may follow at once, and a slow one gets everything too."""
    api.follow(slow)
    with begin(api) as first:
        first.read(4)
    stream_id = first.headers["x-stream-id"]
    with resume(api, stream_id, first.last_id) as second, resume(api, stream_id) as other:
        rest = second.read()
        whole = other.read()
    assert b"".join(first.frames) + rest == whole
    assert b" 20" in whole
    assert api.worker.cancelled.get(stream_id) is None


def test_a_failure_is_part_of_the_stream(api: ApiPool) -> None:
    """A client that comes back sees the error again, with the same id; from the start of a stream that had begun too."""
    api.follow(broken)
    with begin(api) as first:
        first.read()
    assert b"It broke." in first.frames[-1]
    stream_id = first.headers["x-stream-id"]
    with resume(api, stream_id, f"{stream_id}:0") as rest:
        rest.read()
    assert rest.frames == first.frames[1:]
    with resume(api, stream_id) as again:
        assert again.read() == b"".join(first.frames)


def test_wrong_requests(api: ApiPool) -> None:
    """Each is refused by name: a bad header, one without a stream, a bad or foreign position, an unknown or plain stream."""
    with begin(api) as first:
        first.read()
    known = first.headers["x-stream-id"]
    with begin(api, x_resumable="False") as plain:
        plain.read()
    assert "x-stream-id" not in plain.headers
    assert plain.frames == []  # none has an id
    found = re.search(rb'"id":"chatcmpl-([0-9a-f]{30})"', b"".join(plain.unnumbered))
    assert found is not None
    plain_id = found[1].decode()
    assert error_of(begin(api, x_resumable="maybe")) == (400, None, "X-Resumable")
    assert error_of(begin(api, fields={"messages": HI, "stream": False})) == (400, None, "X-Resumable")
    for malformed in ("17", ":17", f"{known}:", f"{known}:-1", f"{known}:x", f"{known}:1e3"):
        assert error_of(resume(api, known, malformed)) == (400, None, "Last-Event-ID")
    assert error_of(resume(api, known, f"{plain_id}:0")) == (400, None, "Last-Event-ID")
    assert error_of(resume(api, known, query="?starting_after=-1")) == (400, None, "starting_after")
    for unknown in ("0" * 30, plain_id, "x" * 300):
        assert error_of(resume(api, unknown))[:2] == (404, "not_found")


def test_an_expired_stream(api: ApiPool) -> None:
    """Its record has a time to live; after that it is unknown."""
    with begin(api) as first:
        first.read()
    stream_id = first.headers["x-stream-id"]
    with connections.connect(api.pool.redis_url) as client:
        assert 0 < client.ttl(names.answer(stream_id)) <= 1200
        client.delete(names.answer(stream_id))
    assert error_of(resume(api, stream_id))[:2] == (404, "not_found")


def test_no_deadline(api: ApiPool) -> None:
    """`X-Request-Timeout` ends the response with an error that has no id; the answer goes on."""
    api.follow(slow)
    with begin(api, x_request_timeout="0.4") as first:
        first.read()
    assert len(first.frames) < 15
    [error] = first.unnumbered
    assert b"deadline_exceeded" in error
    with resume(api, first.headers["x-stream-id"], first.last_id) as rest:
        assert b" 20" in rest.read()


def test_channels_are_left(api: ApiPool) -> None:
    """A process listens to a stream's channel only while it follows the stream."""
    api.follow(slow)
    with connections.connect(api.pool.redis_url) as client, begin(api) as first:
        first.read(2)
        channel = names.stream_channel(first.headers["x-stream-id"])
        assert client.pubsub_numsub(channel) == [(channel.encode(), 1)]
        with resume(api, first.headers["x-stream-id"]) as second:
            second.read(2)
        first.read()
        wait_until(lambda: client.pubsub_numsub(channel) == [(channel.encode(), 0)])
        assert client.pubsub_channels("mlxpool:stream:*") == []


def test_another_key(tmp_path: Path) -> None:
    """Only the key that began a stream resumes it, not even a new key of the same name."""
    path = tmp_path / "keys.json"
    ann, bob = keys.add(path, "ann"), keys.add(path, "bob")
    with api_pool({"MLXPOOL_API_KEYS_FILE": str(path)}) as api:
        with begin(api, authorization=f"Bearer {ann}") as first:
            first.read()
        stream_id = first.headers["x-stream-id"]
        assert error_of(resume(api, stream_id, authorization=f"Bearer {bob}"))[:2] == (404, "not_found")
        with resume(api, stream_id, authorization=f"Bearer {ann}") as again:
            assert again.read() == b"".join(first.frames)
        keys.revoke(path, "ann")
        new = keys.add(path, "ann")
        wait_until(lambda: error_of(resume(api, "x", authorization=f"Bearer {new}"))[0] == 404)
        assert error_of(resume(api, stream_id, authorization=f"Bearer {new}"))[:2] == (404, "not_found")


def test_a_full_store_and_a_shutdown() -> None:
    """A full store refuses resumable requests alone. A stream that a shutdown ends says so without an id, and its job goes on."""
    settings = {"MLXPOOL_MAX_STORED_MB": "1", "MLXPOOL_DRAIN_SECONDS": "1"}
    with api_pool(settings) as api:
        api.follow(slower)
        large = {"messages": HI, "max_tokens": 4000}
        with begin(api, fields=large) as first:
            first.read(2)
            readers = [begin(api, fields=large) for _ in range(6)]
            refused = [reader for reader in readers if reader.status == 503]
            assert 0 < len(refused) < 6
            assert {error_of(reader)[:2] for reader in refused} == {(503, "response_store_full")}
            assert int(refused[0].headers["retry-after"]) > 0
            for reader in readers:
                reader.close()
            plain = api.chat(max_tokens=4000, stream=True)
            assert plain.status == 200
            assert b"id: " not in plain.body
        api.follow(slower)
        with begin(api) as cut:
            cut.read(3)
            api.pool.process("api").send_signal(signal.SIGTERM)
            cut.read()
        assert b"shutting_down" in b"".join(cut.unnumbered)
        assert len(cut.frames) < 20
        api.pool.stop("api")
        api.pool.start_api()
        with resume(api, cut.headers["x-stream-id"], cut.last_id) as rest:
            assert b" 20" in rest.read()
        assert api.worker.cancelled.get(cut.headers["x-stream-id"]) is None
