"""One request's jobs are cancelled as soon as the request has ended, whether or not its client reads."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from api.generation.events.active_request import ActiveRequest
from api.generation.events.relay import Relay
from api.generation.events.subscription import Subscription
from api.generation.job_queue import JobQueue
from common.errors import RequestError
from common.protocol import Delta, Event, Finished, GenerationJob, TextPrompt, Usage


class FakeRelay:
    """Subscriptions that the test feeds."""

    is_connected = True

    def __init__(self) -> None:
        self.subscriptions: list[Subscription] = []

    def subscribe(self, job_id: str, _channel: str) -> Subscription:
        self.subscriptions.append(Subscription(job_id, self._read_journal, 100))
        return self.subscriptions[-1]

    def unsubscribe(self, subscription: Subscription) -> None:
        self.subscriptions.remove(subscription)

    async def _read_journal(self, *_arguments: Any) -> list[Event]:
        raise AssertionError("no event is missed in these tests")


class FakeQueue:
    """Records what is cancelled. `submit` waits for `accepts`."""

    def __init__(self) -> None:
        self.cancelled: list[str] = []
        self.has_cancelled = asyncio.Event()
        self.accepts = asyncio.Event()
        self.accepts.set()

    async def submit(self, *_arguments: Any) -> None:
        await self.accepts.wait()

    def cancel(self, job: GenerationJob) -> None:
        self.cancelled.append(job.job_id)
        self.has_cancelled.set()


def run(
    test: Callable[[ActiveRequest, FakeRelay, FakeQueue], Awaitable[None]], timeout_seconds: float = 60.0
) -> None:
    """Run a test with a request of three jobs, named a, b and c."""

    async def with_request() -> None:
        relay, queue = FakeRelay(), FakeQueue()
        jobs = [GenerationJob(job_id=i, model="m", channel="c", prompt=TextPrompt("")) for i in "abc"]
        active = ActiveRequest(jobs, 1, cast("Relay", relay), cast("JobQueue", queue), timeout_seconds)
        await test(active, relay, queue)

    asyncio.run(with_request())


def test_the_deadline_cancels_the_jobs_of_a_client_that_does_not_read() -> None:
    """Nothing takes the events and `release` is not reached; the jobs end all the same, but not one that has ended."""

    async def test(active: ActiveRequest, relay: FakeRelay, queue: FakeQueue) -> None:
        await active.submit(0)
        relay.subscriptions[0].offer(Finished(1, "stop", Usage(1, 0)))
        await asyncio.wait_for(queue.has_cancelled.wait(), 5)
        assert queue.cancelled == ["b", "c"]
        while not active.is_done:
            await active.take()
        active.release()
        assert queue.cancelled == ["b", "c"]
        assert relay.subscriptions == []

    run(test, timeout_seconds=0.001)


def test_a_deadline_during_the_submission_cancels_again() -> None:
    """A cancellation may overtake the jobs on their way into the queue; another one follows."""

    async def test(active: ActiveRequest, _relay: FakeRelay, queue: FakeQueue) -> None:
        queue.accepts.clear()
        submission = asyncio.create_task(active.submit(0))
        await asyncio.wait_for(queue.has_cancelled.wait(), 5)
        queue.accepts.set()
        await submission
        active.release()
        assert queue.cancelled == [*"abc", *"abc"]

    run(test, timeout_seconds=0.001)


def test_a_cancelled_job_ends_the_request(caplog: pytest.LogCaptureFixture) -> None:
    """A 503 at once, the other jobs are cancelled, and the log line says so."""

    async def test(active: ActiveRequest, relay: FakeRelay, queue: FakeQueue) -> None:
        await active.submit(0)
        relay.subscriptions[1].offer(Delta(1, 7, "x"))
        relay.subscriptions[1].offer(Finished(2, "cancelled", Usage(1, 1)))
        async with asyncio.timeout(5):
            while not active.is_done:
                await active.take()
        assert queue.cancelled == ["a", "c"]
        with pytest.raises(RequestError) as raised:
            active.finished()
        assert (raised.value.status, raised.value.code) == (503, "cancelled")
        assert raised.value.type == "server_error"
        active.release()
        assert queue.cancelled == ["a", "c"]

    with caplog.at_level(logging.INFO, "api.generation.events.active_request"):
        run(test)
    (line,) = caplog.messages
    assert "failed (cancelled), status 503" in line
