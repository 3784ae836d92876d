"""The relay on a real server: published events reach their subscription once and in order, whatever breaks."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import redis
import redis.asyncio

from api.generation.command_batch import CommandBatch
from api.generation.events import relay as module
from api.generation.events import subscription as subscription_module
from api.generation.events.relay import Relay
from api.generation.events.subscription import Subscription
from common import connections, names
from common.errors import StartupError
from common.protocol import Delta, Event, Failed, Finished, Started, Usage, encode
from common.rq import JsonJob

NUM_TOKENS = 50
END = Finished(NUM_TOKENS + 1, "stop", Usage(1, NUM_TOKENS))
ALL: list[Event] = [*(Delta(n, n, f" {n}") for n in range(1, NUM_TOKENS + 1)), END]
JOB = "0123456789abcdef01234567"
PATIENCE_SECONDS = 10


@dataclass
class Side:
    """Both ends: the relay of an API process, and a worker's commands."""

    relay: Relay
    client: redis.asyncio.Redis

    async def write(self, event: Event, job_id: str = JOB) -> None:
        await self.client.xadd(names.journal(job_id), {"x": "w", "d": encode(event)}, id=f"{event.n}-0")

    async def say(self, *events: Event, job_id: str = JOB) -> None:
        await self.client.publish(self.relay.channel, encode([(job_id, event) for event in events]))

    async def set_status(self, status: str | None, job_id: str = JOB) -> None:
        key = JsonJob.key_for(job_id)
        await (self.client.hset(key, "status", status) if status else self.client.delete(key))

    async def kill_subscribed(self) -> None:
        await self.client.execute_command("CLIENT", "KILL", "TYPE", "PUBSUB")


def run(url: str, test: Callable[[Side], Awaitable[None]], max_events: int = 1000) -> None:
    async def with_relay() -> None:
        async with relay_at(url, max_events) as side:
            await asyncio.wait_for(test(side), PATIENCE_SECONDS)  # type: ignore[arg-type]

    asyncio.run(with_relay())


@asynccontextmanager
async def relay_at(url: str, max_events: int) -> AsyncIterator[Side]:
    client = connections.connect_async(url)
    worker = connections.connect_async(url)
    relay = Relay(client, CommandBatch(client, transaction=False), max_events=max_events, queue_seconds=60)
    await relay.start()
    try:
        yield Side(relay, worker)
    finally:
        await relay.stop()
        await client.aclose()
        await worker.aclose()


async def take_all(subscription: Subscription) -> list[Event]:
    taken: list[Event] = []
    while subscription.terminal is None or subscription.terminal not in taken:
        taken += await subscription.take()
    return taken


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The relay's clocks, for tests that would wait for them."""
    monkeypatch.setattr(module, "TICK_SECONDS", 0.05)
    monkeypatch.setattr(module, "SILENT_SECONDS", 0.2)
    monkeypatch.setattr(module, "PING_SECONDS", 0.2)
    monkeypatch.setattr(module, "PONG_SECONDS", 0.3)
    monkeypatch.setattr(module, "RECONNECT_SECONDS", 0.05)


def test_a_step_reaches_every_subscription(redis_url: str) -> None:
    """One message carries events of many jobs; those of unknown jobs are ignored."""

    async def test(side: Side) -> None:
        mine, other = (
            side.relay.subscribe(JOB, side.relay.channel),
            side.relay.subscribe("other", side.relay.channel),
        )
        message = [
            (JOB, Started(0, 5)),
            ("stranger", ALL[0]),
            ("other", ALL[0]),
            (JOB, ALL[0]),
            (JOB, ALL[1]),
        ]
        await side.client.publish(side.relay.channel, encode(message))
        assert await mine.take() == [Started(0, 5), ALL[0], ALL[1]]
        assert await other.take() == [ALL[0]]
        side.relay.unsubscribe(mine)
        assert side.relay.num_subscriptions == 1

    run(redis_url, test)


def test_losses_and_repetitions(redis_url: str) -> None:
    """Lost and repeated messages do not change the events: the journal has them all."""

    async def test(side: Side) -> None:
        chance = random.Random(5)  # noqa: S311 (a seed for repetition)
        subscription = side.relay.subscribe(JOB, side.relay.channel)
        taking = asyncio.create_task(take_all(subscription))
        for event in ALL:
            await side.write(event)
            for _ in range(chance.choice([0, 1, 1, 2])):
                await side.say(event)
        await side.say(END)
        assert await taking == ALL

    run(redis_url, test)


@pytest.mark.usefixtures("_quick")
def test_a_dropped_connection(redis_url: str) -> None:
    """After CLIENT KILL the channel is subscribed again, and missed events are read from the journal."""

    async def test(side: Side) -> None:
        subscription = side.relay.subscribe(JOB, side.relay.channel)
        taking = asyncio.create_task(take_all(subscription))
        for event in ALL:
            if event.n % 10 == 5:
                await side.kill_subscribed()
            await side.write(event)
            await side.say(event)
            await asyncio.sleep(0.002)
        assert await taking == ALL
        assert not subscription.is_aborted

    run(redis_url, test)


@pytest.mark.usefixtures("_quick")
def test_an_end_that_is_published_while_the_connection_is_down(redis_url: str) -> None:
    """It is read from the journal when the connection is back, without waiting for the status check."""

    async def test(side: Side) -> None:
        subscription = side.relay.subscribe(JOB, side.relay.channel)
        await side.kill_subscribed()
        for event in ALL:
            await side.write(event)
        assert await take_all(subscription) == ALL

    run(redis_url, test)


@pytest.mark.usefixtures("_quick")
def test_a_half_open_connection(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket that is silent but not closed is detected by a ping, and replaced."""

    async def test(side: Side) -> None:
        subscription = side.relay.subscribe(JOB, side.relay.channel)
        forwarding.stall()
        for event in ALL:
            await side.write(event)
        assert await take_all(subscription) == ALL

    forwarding = Forwarding(redis_url)

    async def through_a_proxy() -> None:
        port = await forwarding.start()
        async with relay_at(f"redis://127.0.0.1:{port}/0", 1000) as side:
            await asyncio.wait_for(test(side), PATIENCE_SECONDS)
        await forwarding.stop()

    asyncio.run(through_a_proxy())


class Forwarding:
    """A proxy whose first connections can be made to hang, like a pulled cable."""

    def __init__(self, url: str) -> None:
        self._port = int(url.rsplit(":", 1)[1].split("/", maxsplit=1)[0])
        self._tasks: list[asyncio.Task[None]] = []
        self._stalled: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []

    async def start(self) -> int:
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    def stall(self) -> None:
        self._stalled.update(self._tasks)

    async def stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        for writer in self._writers:
            writer.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(w.wait_closed() for w in self._writers), return_exceptions=True)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_server, from_server = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers += [writer, from_server]
        for source, target in ((reader, from_server), (to_server, writer)):
            self._tasks.append(asyncio.create_task(self._forward(source, target)))

    async def _forward(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            if asyncio.current_task() in self._stalled:
                await asyncio.sleep(60)
            target.write(data)


def test_a_slow_client_costs_no_memory(redis_url: str) -> None:
    """No more than its buffer is held, and it receives all events."""

    async def test(side: Side) -> None:
        slow, quick = (
            side.relay.subscribe(JOB, side.relay.channel),
            side.relay.subscribe("quick", side.relay.channel),
        )
        for event in ALL:
            await side.write(event)
            await side.client.publish(side.relay.channel, encode([(JOB, event), ("quick", event)]))
            if event.n <= 8:
                assert await quick.take() == [event]
        pieces: list[list[Event]] = []
        while slow.terminal is None:
            pieces.append(await slow.take())
            await asyncio.sleep(0.001)
        assert max(len(piece) for piece in pieces) <= 8
        assert [event for piece in pieces for event in piece] == ALL

    run(redis_url, test, max_events=8)


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize(
    ("status", "code", "http_status"),
    [
        (None, "queue_timeout", 503),
        ("failed", "answer_lost", 500),
        ("finished", "answer_lost", 500),
        ("stopped", "stopped", 503),
        ("canceled", "stopped", 503),
    ],
)
def test_a_job_that_ends_without_a_published_event(
    redis_url: str, status: str | None, code: str, http_status: int
) -> None:
    """The status check ends its stream once, with a reason; later events are dropped."""

    async def test(side: Side) -> None:
        subscription = side.relay.subscribe(JOB, side.relay.channel)
        subscription.last_event_mono = asyncio.get_running_loop().time()
        await side.set_status(status)
        [failed] = await take_all(subscription)
        assert isinstance(failed, Failed)
        assert (failed.code, failed.status) == (code, http_status)
        await side.say(ALL[0])
        await asyncio.sleep(0.1)
        assert subscription.terminal == failed

    run(redis_url, test)


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("status", ["finished", "failed", None])
def test_the_status_check_reads_the_journal_first(redis_url: str, status: str | None) -> None:
    """The client gets the end that is in the journal, even if its message was lost."""

    async def test(side: Side) -> None:
        subscription = side.relay.subscribe(JOB, side.relay.channel)
        subscription.last_event_mono = asyncio.get_running_loop().time()
        for event in ALL:
            await side.write(event)
        await side.set_status(status)
        assert await take_all(subscription) == ALL

    run(redis_url, test)


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("status", ["queued", "started"])
def test_a_silent_job_that_still_runs_continues(redis_url: str, status: str) -> None:
    """Long waits and slow prompts are no errors; the handler wakes up meanwhile."""

    async def test(side: Side) -> None:
        subscription = side.relay.subscribe(JOB, side.relay.channel)
        subscription.last_event_mono = asyncio.get_running_loop().time()
        await side.set_status(status)
        for _ in range(20):
            assert await subscription.take() == []
        assert subscription.terminal is None
        await side.say(ALL[0])
        while not (events := await subscription.take()):
            pass
        assert events == [ALL[0]]

    run(redis_url, test)


def test_a_message_that_cannot_be_decoded(redis_url: str) -> None:
    """It is logged and skipped, and the journals are read, in case it was one of ours."""

    async def test(side: Side) -> None:
        subscription = side.relay.subscribe(JOB, side.relay.channel)
        await side.write(ALL[0])
        await side.client.publish(side.relay.channel, b"\xff{")
        assert await take_some(subscription) == [ALL[0]]
        await side.say(ALL[1])
        assert await take_some(subscription) == [ALL[1]]

    run(redis_url, test)


async def take_some(subscription: Subscription) -> list[Event]:
    while not (events := await subscription.take()):
        pass
    return events


def test_shutting_down_ends_every_stream(redis_url: str) -> None:
    """With an error, and marked as aborted, since the job itself has not ended."""

    async def test(side: Side) -> None:
        subscription = side.relay.subscribe(JOB, side.relay.channel)
        side.relay.end_all()
        [failed] = await take_all(subscription)
        assert isinstance(failed, Failed)
        assert failed.code == "shutting_down"
        assert subscription.is_aborted

    run(redis_url, test)


def test_without_a_server() -> None:
    """The relay starts, is not connected, and stops."""

    async def run_without() -> None:
        client = connections.connect_async("redis://127.0.0.1:1/0")
        relay = Relay(client, CommandBatch(client, transaction=False), max_events=10, queue_seconds=60)
        await relay.start()
        assert not relay.is_connected
        await relay.stop()
        await client.aclose()

    original, module.START_SECONDS = module.START_SECONDS, 0.2
    try:
        asyncio.run(run_without())
    finally:
        module.START_SECONDS = original
    assert subscription_module.RETRY_SECONDS > 0


@pytest.mark.parametrize(
    ("password", "sentence"),
    [
        ("", "requires a password in MLXPOOL_REDIS_URL: redis://:PASSWORD@HOST:6379/0"),
        (":wrong@", "refuses the password in MLXPOOL_REDIS_URL"),
    ],
)
def test_a_server_that_refuses_the_password(
    redis_url: str, password: str, sentence: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The API's log and a starting worker report the password, not an unavailable server."""
    url = redis_url.replace("redis://", f"redis://{password}")

    async def test() -> None:
        async with relay_at(url, 10) as side:
            assert not side.relay.is_connected

    with connections.connect(redis_url) as client:
        client.config_set("requirepass", "right")
        try:
            asyncio.run(test())
            with connections.connect(url) as refused, pytest.raises(StartupError, match=re.escape(sentence)):
                connections.check(refused)
        finally:
            client.auth("right")
            client.config_set("requirepass", "")
    [said] = [
        record.getMessage() for record in caplog.records if record.name == "api.generation.events.relay"
    ]
    assert sentence in said
    assert "away" not in said
