"""Resumable streams while everything around them is killed: the bytes of all pieces together are those of an undisturbed stream."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench import chaos
from bench.harness.pool import Pool, family_pids
from common import connections
from common.rq import JsonJob
from tests.chaos.conftest import Chaos
from tests.e2e.resuming import StreamReader, anonymous
from tests.redis.pool_of_workers import exact, wait_until

NUM_TOKENS = 150
PROMPT = [{"role": "user", "content": "Write a story about a lighthouse."}]


class Apis:
    """Two servers of the API on one Redis, each with a port of its own."""

    def __init__(self, pool: Pool) -> None:
        self.ports: list[int] = []
        self._pids: list[list[int]] = []
        for _ in range(2):
            before = set(pool.pids("api"))
            pool.start_api()
            self.ports.append(pool.port)
            self._pids.append([pid for pid in pool.pids("api") if pid not in before])

    def kill(self, index: int) -> None:
        for pid in self._pids[index]:
            for each in family_pids(pid):
                psutil.Process(each).kill()


def begin(port: int, model: str, **fields: Any) -> StreamReader:
    body = {"model": model, "stream": True, "messages": PROMPT, "max_tokens": NUM_TOKENS} | fields
    return StreamReader(port, "POST", "/v1/chat/completions", json.dumps(body).encode(), x_resumable="true")


def resume(port: int, stream_id: str, last_id: str = "") -> StreamReader:
    return StreamReader(port, "GET", f"/v1/streams/{stream_id}", last_event_id=last_id)


def text_of(stream: bytes) -> str:
    """The text of choice 0."""
    chunks = [json.loads(data) for data in re.findall(rb"(?m)^data: (\{.*)$", stream)]
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == 0]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


@pytest.mark.settings(lease_seconds=1, orphan_seconds=1)
@pytest.mark.parametrize("victims", ["client", "api", "worker", "client api worker"])
def test_kills_in_a_row(running: Chaos, victims: str) -> None:
    """The stream goes on at the other server; every token comes once, in order, and RQ knows the job as finished."""
    running.workers = chaos.Workers(running.pool)
    running.workers.start()
    apis = Apis(running.pool)
    with begin(apis.ports[0], chaos.MODEL) as first:
        stream_id = first.headers["x-stream-id"]
        first.read(20)
        pieces, last_id = b"".join(first.frames), first.last_id
        if victims == "api":
            apis.kill(0)
            pieces, last_id = first.read(), first.last_id  # what was on its way
            assert first.unnumbered == []
    if "api" in victims and victims != "api":
        apis.kill(0)
    with resume(apis.ports[1], stream_id, last_id) as second:
        second.read(10)
        if "worker" in victims:
            running.workers.kill(running.workers.roles[0])
            running.workers.start()
        pieces += second.read()
        assert second.unnumbered == []
    with resume(apis.ports[1], stream_id) as again:
        assert again.read() == pieces
    assert text_of(pieces) == exact(NUM_TOKENS)
    with connections.connect(running.pool.redis_url) as client:
        wait_until(lambda: JsonJob.fetch(stream_id, connection=client).get_status().value == "finished")
    wait_until(lambda: not chaos.leftovers(running.pool), 20)


@pytest.fixture
def real(demo_folder: Path) -> Iterator[tuple[Pool, list[str]]]:
    """A pool, and the command of a worker of the demo model."""
    command = ["worker", "--model", str(demo_folder), "--name", "demo", "--log-level", "WARNING"]
    with Pool({"MLXPOOL_LEASE_SECONDS": "1"}) as pool:
        pool.start_worker(command, "demo", "first")
        yield pool, command


@pytest.mark.heavy
def test_bytes_of_a_real_model(real: tuple[Pool, list[str]]) -> None:
    """Greedy, and two seeded choices: all pieces together are, but for id and time, an undisturbed stream."""
    pool, command = real
    apis = Apis(pool)
    cases: list[dict[str, Any]] = [
        {"temperature": 0, "max_tokens": 60},
        {"temperature": 1.0, "seed": 7, "n": 2, "max_tokens": 60},
    ]
    undisturbed = []
    for case in cases:
        with begin(apis.ports[0], "demo", **case) as reader:
            undisturbed.append(reader.read())
    firsts = [begin(apis.ports[0], "demo", **case) for case in cases]
    pieces = []
    for first in firsts:
        pieces.append(first.read(8))
        first.__exit__(None, None, None)
    apis.kill(0)
    pool.process("first").kill()
    pool.start_worker(command, "demo", "second")
    for i, first in enumerate(firsts):
        with resume(apis.ports[1], first.headers["x-stream-id"], first.last_id) as rest:
            pieces[i] += rest.read()
            assert rest.unnumbered == []
    assert [anonymous(stream) for stream in pieces] == [anonymous(stream) for stream in undisturbed]
