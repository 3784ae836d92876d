"""Fuzzing: sends thousands of nearly valid bodies to a pool. None may cause a 5xx, and none may leave jobs behind.

`python -m bench.fuzz --requests 10000` starts a private pool with a synthetic worker and prints the responses by status. `bench.fuzz.judge` checks
each response. `tests/e2e` runs a shorter version.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from bench.fuzz.bodies import BODIES, Body
from bench.fuzz.judge import OK, Answer, Judge, as_json
from bench.fuzz.texts import MODEL
from bench.harness.pool import HOST, Pool, synthetic_worker
from bench.harness.table import say
from common import connections
from common.rq import JsonQueue

WAVE = 4
"""Bodies that are sent concurrently, each on a persistent connection of its own."""

MAX_BATCH = 8
CONTEXT_LENGTH = 4096
IDLE_SECONDS = 15.0

_TIMEOUT_SECONDS = 60.0


@dataclass
class Fuzz:
    """Sends bodies over persistent connections, and counts responses.

    Attributes:
        statuses: Responses by status; streams are counted separately.
        params: Refusals by the param that they name, without indices.
        num_connections: Opened so far; few, since a refusal does not close the connection.
    """

    port: int
    statuses: Counter[str] = field(default_factory=Counter)
    params: Counter[str] = field(default_factory=Counter)
    num_connections: int = 0

    def __post_init__(self) -> None:
        self._connections: dict[int, http.client.HTTPConnection] = {}
        self._judge = Judge(json.loads(self.get("/openapi.json")))

    def run(self, num_requests: int, *, is_repeatable: bool = False) -> None:
        """Send about `num_requests` bodies.

        Args:
            is_repeatable: Send the same bodies each time.

        Raises:
            WrongAnswerError: With the smallest failing body that Hypothesis found.
        """

        @settings(
            max_examples=max(1, num_requests // WAVE),
            deadline=None,
            database=None,
            derandomize=is_repeatable,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.lists(BODIES, min_size=WAVE, max_size=WAVE))
        def send(bodies: list[Body]) -> None:
            self.send(bodies)

        try:
            send()
        finally:
            self.close()

    def send(self, bodies: list[Body]) -> None:
        """Send all bodies, then read and check all responses."""
        for i, body in enumerate(bodies):
            self._connection(i).request("POST", body.path, body.data, {"content-type": "application/json"})
        answers = [self._read(i) for i in range(len(bodies))]
        for body, answer in zip(bodies, answers, strict=True):
            kind = " stream" if answer.content_type.startswith("text/event-stream") else ""
            self.statuses[f"{answer.status}{kind}"] += 1
            self._judge.check(body, answer)
            if answer.status != OK:
                param = as_json(answer)["error"].get("param")
                self.params[re.sub(r"\[\d+\]", "[]", str(param))] += 1

    def get(self, path: str) -> bytes:
        """The body of a GET response."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=_TIMEOUT_SECONDS)
        try:
            connection.request("GET", path)
            return connection.getresponse().read()
        finally:
            connection.close()

    def close(self) -> None:
        """Close the connections."""
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()

    def left_behind(self, redis_url: str, model: str = MODEL) -> Iterator[str]:
        """What an idle pool must not have: requests in the API, jobs in the queue or at a worker."""
        if num := json.loads(self.get("/health"))["open_requests"]:
            yield f"{num} requests are running"
        with connections.connect(redis_url) as client:
            queue = JsonQueue(model, connection=client)
            for name, num in (
                ("queued", queue.count),
                ("being taken", client.llen(queue.intermediate_queue_key)),
                ("started", queue.started_job_registry.count),
            ):
                if num:
                    yield f"{num} jobs {name}"

    def _connection(self, i: int) -> http.client.HTTPConnection:
        if i not in self._connections:
            self._connections[i] = http.client.HTTPConnection(HOST, self.port, timeout=_TIMEOUT_SECONDS)
        if self._connections[i].sock is None:
            self.num_connections += 1
        return self._connections[i]

    def _read(self, i: int) -> Answer:
        response = self._connections[i].getresponse()
        return Answer(response.status, response.headers["content-type"], response.read())


def main(argv: list[str] | None = None) -> int:
    """Send bodies, print counts and check that nothing is left; the exit status is 1 if something is."""
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz", description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000, metavar="N")
    options = parser.parse_args(argv)
    with Pool() as pool:
        context = ("--context-length", str(CONTEXT_LENGTH))
        pool.start_worker(synthetic_worker(MODEL, MAX_BATCH, *context), MODEL)
        pool.start_api()
        fuzz, began_at = Fuzz(pool.port), time.monotonic()
        try:
            fuzz.run(options.requests)
        finally:
            seconds = time.monotonic() - began_at
            say(f"{fuzz.statuses.total()} bodies in {seconds:.0f} s, {fuzz.num_connections} connections")
            say(
                "by status: "
                + ", ".join(f"{num} × {status}" for status, num in sorted(fuzz.statuses.items()))
            )
            say("refused for: " + ", ".join(f"{num} × {param}" for param, num in fuzz.params.most_common()))
        left = _left(fuzz, pool)
        say(f"left behind: {', '.join(left) or 'nothing'}")
    return 1 if left else 0


def _left(fuzz: Fuzz, pool: Pool) -> list[str]:
    """What is left behind once RQ's bookkeeping of the last jobs is done."""
    deadline = time.monotonic() + IDLE_SECONDS
    while True:
        [model] = json.loads(fuzz.get("/v1/models"))["data"] or [{"free_slots": 0}]
        left = list(fuzz.left_behind(pool.redis_url))
        if model["free_slots"] != MAX_BATCH:
            left.append(f"{MAX_BATCH - model['free_slots']} slots")
        if pool.process("worker").poll() is not None:
            left.append("a worker that died")
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)
