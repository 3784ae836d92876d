"""Jobs go into RQ's queues and out of them, as RQ itself sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
import redis

from api.generation.command_batch import CommandBatch
from api.generation.job_queue import JobQueue, QueueFullError
from common import connections, names
from common.errors import RequestError
from common.protocol import Cancel, ChatPrompt, GenerationJob, SamplingParams, decode_control
from common.rq import JsonJob, JsonQueue
from common.settings import Settings

MODEL = "org/model: 1 (é)"
SECRET = "a prompt that nobody may see"


def job(job_id: str = "0123456789abcdef01234567", **fields: Any) -> GenerationJob:
    prompt = ChatPrompt([{"role": "user", "content": SECRET}])
    sampling = SamplingParams(logit_bias={5: 1.0})
    return GenerationJob(
        **{"job_id": job_id, "model": MODEL, "channel": "c", "prompt": prompt, "sampling": sampling} | fields
    )


def run(url: str, test: Callable[[JobQueue], Awaitable[None]], **settings: Any) -> None:
    async def with_queue() -> None:
        client = connections.connect_async(url)
        queue = JobQueue(Settings(redis_url=url, **settings), CommandBatch(client, transaction=True))
        try:
            await test(queue)
        finally:
            await queue.close()
            await client.aclose()

    asyncio.run(with_queue())


@pytest.fixture
def client(redis_url: str) -> redis.Redis:
    return redis.Redis.from_url(redis_url)


def test_rq_sees_the_job(redis_url: str, client: redis.Redis) -> None:
    """It is in its model's queue with the complete request and our limits, and no prompt in its description."""

    async def test(queue: JobQueue) -> None:
        await queue.submit([job()])

    run(redis_url, test, queue_seconds=77, result_ttl_seconds=5, failure_ttl_seconds=6, max_takeovers=2)
    with client:
        [seen] = JsonQueue(MODEL, connection=client).jobs
        assert msgspec.convert(seen.kwargs, GenerationJob, str_keys=True) == job()
        assert (seen.func_name, seen.get_status()) == (names.JOB_FUNCTION, "queued")
        assert (seen.ttl, seen.result_ttl, seen.failure_ttl, seen.retries_left) == (77, 5, 6, 2)
        assert seen.enqueue_at_front_on_retry
        assert 70 <= client.ttl(seen.key) <= 77
        assert SECRET not in (seen.description or "")
        assert JsonQueue.all(connection=client)[0].name == MODEL


def test_a_large_job(redis_url: str, client: redis.Redis) -> None:
    """A job that is compressed off the event loop arrives unchanged."""
    large = job(prompt=ChatPrompt([{"role": "user", "content": "é" * 500_000}]))

    async def test(queue: JobQueue) -> None:
        await queue.submit([large], num_bytes=1_000_000)

    run(redis_url, test)
    with client:
        [seen] = JsonQueue(MODEL, connection=client).jobs
        assert msgspec.convert(seen.kwargs, GenerationJob, str_keys=True) == large


def test_a_burst_is_few_round_trips(redis_url: str, client: redis.Redis) -> None:
    """Requests of the same moment share a transaction and a connection, in order."""
    ids = [f"{i:024x}" for i in range(200)]

    async def test(queue: JobQueue) -> None:
        await asyncio.gather(*(queue.submit([job(job_id)]) for job_id in ids))

    with client:
        before = client.info("commandstats").get("cmdstat_exec", {"calls": 0})["calls"]
        connections_before = client.info("stats")["total_connections_received"]
        run(redis_url, test)
        assert JsonQueue(MODEL, connection=client).job_ids == ids
        assert client.info("commandstats")["cmdstat_exec"]["calls"] - before <= 5
        assert client.info("stats")["total_connections_received"] - connections_before == 1


def test_cancelling_a_queued_job(redis_url: str, client: redis.Redis) -> None:
    """It leaves the queue and its hash is deleted; workers are notified, and a mark is left for a worker that is taking it at that moment."""

    async def test(queue: JobQueue) -> None:
        await queue.submit([job()])
        queue.cancel(job())

    with client, client.pubsub(ignore_subscribe_messages=True) as pubsub:
        pubsub.subscribe(names.control_channel(MODEL))
        pubsub.get_message(timeout=1)
        run(redis_url, test)
        assert JsonQueue(MODEL, connection=client).job_ids == []
        assert not client.exists(JsonJob.key_for(job().job_id))
        assert 0 < client.ttl(names.cancelled(job().job_id)) <= names.CANCEL_MARK_SECONDS
        message = pubsub.get_message(timeout=1)
        assert message is not None
        assert decode_control(message["data"]) == Cancel([job().job_id])


def test_cancelling_a_job_that_was_taken(redis_url: str, client: redis.Redis) -> None:
    """The job's hash is kept: its worker does the bookkeeping."""

    async def test(queue: JobQueue) -> None:
        await queue.submit([job()])
        await asyncio.to_thread(client.lpop, JsonQueue(MODEL, connection=client).key)
        queue.cancel(job())

    with client:
        run(redis_url, test)
        assert client.exists(JsonJob.key_for(job().job_id))
        assert client.exists(names.cancelled(job().job_id))


def test_many_cancellations_at_once(redis_url: str, client: redis.Redis) -> None:
    """They are sent together, and none is lost."""
    ids = [f"{i:024x}" for i in range(300)]

    async def test(queue: JobQueue) -> None:
        await asyncio.gather(*(queue.submit([job(job_id)]) for job_id in ids))
        for job_id in ids:
            queue.cancel(job(job_id))

    with client:
        run(redis_url, test)
        assert JsonQueue(MODEL, connection=client).job_ids == []
        assert client.keys("rq:job:*") == []


def test_without_a_server() -> None:
    """The error has a retry-after; a cancellation is sent again later and does not delay the shutdown."""

    async def test(queue: JobQueue) -> None:
        with pytest.raises(RequestError) as raised:
            await queue.submit([job()])
        assert (raised.value.status, raised.value.code) == (503, "queue_unavailable")
        assert raised.value.retry_after_seconds is not None
        queue.cancel(job())

    run("redis://127.0.0.1:1/0", test)


def test_a_cancellation_outlasts_an_outage(redis_url: str, client: redis.Redis) -> None:
    """It is sent again until the server takes it."""

    async def test(queue: JobQueue) -> None:
        await queue.submit([job()])
        await asyncio.to_thread(client.config_set, "maxmemory", 1)  # Redis refuses to write
        queue.cancel(job())
        await asyncio.sleep(0.2)
        await asyncio.to_thread(client.config_set, "maxmemory", 0)

    with client:
        run(redis_url, test)
        assert JsonQueue(MODEL, connection=client).job_ids == []


def test_a_full_queue(redis_url: str, client: redis.Redis) -> None:
    """A job beyond the limit of requests or tokens is not queued and leaves no keys; space that becomes free is used again."""

    async def test(queue: JobQueue) -> None:
        ids = [names.new_job_id(100) for _ in range(4)]
        await queue.submit([job(ids[0])])
        await queue.submit([job(ids[1])])
        with pytest.raises(QueueFullError) as full:
            await queue.submit([job(ids[2])])
        assert (full.value.num_requests, full.value.is_tokens) == (2, False)
        client.lpop(JsonQueue(MODEL, connection=client).key)
        with pytest.raises(QueueFullError) as full:
            await queue.submit([job(names.new_job_id(450))])
        assert (full.value.num_requests, full.value.is_tokens) == (1, True)
        await queue.submit([job(ids[3])])
        assert JsonQueue(MODEL, connection=client).job_ids == [ids[1], ids[3]]
        assert not client.exists(JsonJob.key_for(ids[2]))

    with client:
        run(redis_url, test, max_queued_requests=2, max_queued_tokens=500)


def test_the_choices_of_a_request_are_queued_together(redis_url: str, client: redis.Redis) -> None:
    """All of them in their order, or none; they may exceed the limit only if nothing waits."""

    async def test(queue: JobQueue) -> None:
        ids = [names.new_job_id(10) for _ in range(9)]
        await queue.submit([job(each) for each in ids[:3]])
        assert JsonQueue(MODEL, connection=client).job_ids == ids[:3]
        with pytest.raises(QueueFullError):
            await queue.submit([job(each) for each in ids[3:6]])
        assert JsonQueue(MODEL, connection=client).job_ids == ids[:3]
        await queue.submit([job(each) for each in ids[3:5]])
        client.delete(JsonQueue(MODEL, connection=client).key)
        await queue.submit([job(each) for each in ids[3:]])
        assert JsonQueue(MODEL, connection=client).job_ids == ids[3:]

    with client:
        run(redis_url, test, max_queued_requests=5)


def test_an_empty_queue_takes_a_request_of_any_size(redis_url: str, client: redis.Redis) -> None:
    """A request larger than the limit would otherwise be refused for ever; a foreign id counts as no tokens."""

    async def test(queue: JobQueue) -> None:
        await queue.submit([job(names.new_job_id(10_000))])

    with client:
        run(redis_url, test, max_queued_tokens=500)
        queued = JsonQueue(MODEL, connection=client)
        assert queued.count == 1
        client.delete(queued.key)
        client.rpush(queued.key, "not one of ours")
        with pytest.raises(QueueFullError):
            run(redis_url, test, max_queued_tokens=500)


def test_concurrent_requests_for_the_last_places(redis_url: str, client: redis.Redis) -> None:
    """Of concurrent requests, exactly as many are queued as there is room for."""

    async def test(queue: JobQueue) -> None:
        submits = [queue.submit([job(names.new_job_id(1))]) for _ in range(50)]
        answers = await asyncio.gather(*submits, return_exceptions=True)
        assert sum(answer is None for answer in answers) == 7
        assert sum(isinstance(answer, QueueFullError) for answer in answers) == 43

    with client:
        run(redis_url, test, max_queued_requests=7)
        assert JsonQueue(MODEL, connection=client).count == 7


def test_queue_objects_are_bounded(redis_url: str) -> None:
    """A process does not keep an object for every model that was ever served."""

    async def test(queue: JobQueue) -> None:
        for i in range(300):
            queue._record(job(model=f"model {i}"))
        assert len(queue._queues) < 300

    run(redis_url, test)
