"""The store of answers on a real server: who may read what, how it stands, how long it lives, and how much fits."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
import redis

from api.generation import answer_store
from api.generation.answer_store import AnswerStore
from api.generation.command_batch import CommandBatch
from api.generation.events.relay import Relay
from api.generation.job_queue import JobQueue, QueueFullError, StoreFullError
from api.generation.request import GenerationRequest, Retention
from api.generation.served_model import ServedModel
from api.generation.stored_answer import OPEN_API
from common import connections, names, retention
from common.errors import RequestError
from common.protocol import (
    Delta,
    Event,
    Failed,
    Finished,
    GenerationJob,
    SamplingParams,
    TextPrompt,
    Usage,
    encode,
)
from common.rq import JsonJob, JsonQueue
from common.settings import Settings

MODEL = ServedModel(
    id="m",
    created=0,
    context_length=100,
    vocab_size=10,
    num_workers=1,
    free_slots=1,
    quantization="",
)
END = Finished(2, "stop", Usage(1, 1))


@dataclass
class Store:
    """The store, its queue, and a client for what a worker would write."""

    answers: AnswerStore
    queue: JobQueue
    client: redis.Redis

    async def submit(
        self, *, owner: str = "ann", tokens: int = 10, n: int = 1, **options: Any
    ) -> list[GenerationJob]:
        """Store and enqueue a request of `n` choices."""
        request = GenerationRequest(
            model="m",
            prompts=[TextPrompt("x")],
            max_tokens=5,
            stop=[],
            top_logprobs=None,
            sampling=SamplingParams(),
            stream=True,
            ignored=[],
            n=n,
            best_of=n,
            retention=Retention(**{"ttl_seconds": 60, "details": {"é": [1]}} | options),
        )
        assert request.retention is not None
        jobs = request.jobs("front", MODEL, "c", [tokens])
        record = await self.answers.new_record(jobs, request.retention, owner, tokens)
        await self.queue.submit(jobs, 0, record)
        return jobs

    def write(self, job: GenerationJob, *events: Event, status: str | None = None) -> None:
        """What a worker writes."""
        for event in events:
            self.client.xadd(names.journal(job.job_id), {"x": "w", "d": encode(event)}, id=f"{event.n}-0")
        if status is not None:
            self.client.hset(JsonJob.key_for(job.job_id), "status", status)

    def end(self, job: GenerationJob, ttl_seconds: int = 60) -> None:
        """A worker's report that a job has ended."""
        assert job.answer_id is not None
        self.client.execute_command(*retention.on_end(job.answer_id, job.job_id, ttl_seconds))

    @property
    def total_bytes(self) -> int:
        return int(self.client.hget(names.ANSWER_BYTES, "total") or 0)  # type: ignore[arg-type]


def run(url: str, test: Callable[[Store], Awaitable[None]], **settings: Any) -> None:
    async def with_store() -> None:
        client = connections.connect_async(url)
        config = Settings(redis_url=url, **settings)
        writes = CommandBatch(client, transaction=True)
        queue = JobQueue(config, writes)
        reads = CommandBatch(client, transaction=False)
        relay = Relay(client, reads, max_events=100, queue_seconds=60)
        answers = AnswerStore(config, reads, writes, queue, relay)
        with connections.connect(url) as worker:
            try:
                await test(Store(answers, queue, worker))
            finally:
                await queue.close()
                await client.aclose()

    asyncio.run(with_store())


def test_an_answer_is_stored_with_its_jobs(redis_url: str) -> None:
    """In the transaction that enqueues them; it comes back as it was given."""

    async def test(store: Store) -> None:
        before = store.client.info("commandstats").get("cmdstat_exec", {"calls": 0})["calls"]
        [job] = await store.submit(is_detached=True)
        assert store.client.info("commandstats")["cmdstat_exec"]["calls"] == before + 1
        answer = await store.answers.load(job.job_id, "ann")
        assert (answer.id, answer.model, answer.is_cancelled) == (job.job_id, "m", False)
        assert answer.retention == Retention(ttl_seconds=60, is_detached=True, details={"é": [1]})
        assert answer.record.front_end == "front"
        assert answer.channel == job.channel == names.stream_channel(job.job_id)
        assert (job.final_ttl_seconds, job.is_detached, job.answer_id) == (60, True, job.job_id)
        assert JsonQueue("m", connection=store.client).job_ids == [job.job_id]

    run(redis_url, test)


def test_large_details(redis_url: str) -> None:
    """A conversation of megabytes comes back unchanged."""

    async def test(store: Store) -> None:
        details = {"input": "é" * 500_000}
        [job] = await store.submit(details=details)
        assert (await store.answers.load(job.job_id, "ann")).retention.details == details
        assert store.client.memory_usage(names.answer(job.job_id)) < 100_000

    run(redis_url, test)


def test_only_its_owner_finds_an_answer(redis_url: str) -> None:
    """Another key's answer and one that does not exist get the same 404; so does one that another program wrote."""

    async def test(store: Store) -> None:
        [job] = await store.submit()
        store.client.hset(names.answer("foreign"), mapping={"owner": "ann", "record": "{"})
        store.client.hset(names.answer("bomb"), mapping={"owner": "ann", "details": "x"})
        errors = []
        for answer_id, owner in [
            (job.job_id, "bob"),
            (job.job_id, OPEN_API),
            ("none", "ann"),
            ("foreign", "ann"),
            ("bomb", "ann"),
        ]:
            with pytest.raises(RequestError) as raised:
                await store.answers.load(answer_id, owner)
            errors.append(raised.value)
        assert {(error.status, error.code) for error in errors} == {(404, "not_found")}
        assert len({error.message.replace(job.job_id, "none") for error in errors[:3]}) == 1

    run(redis_url, test)


def failed(n: int) -> Failed:
    return Failed(n, "It broke.", code="broken", retry_after_seconds=2.0)


STATES: list[tuple[list[list[Event]], list[str | None], str, str | None]] = [
    ([[], []], ["queued", "queued"], "queued", None),
    ([[], []], ["started", "queued"], "in_progress", None),
    ([[Delta(1, 1, "a")], []], ["queued", "queued"], "in_progress", None),
    ([[Delta(1, 1, "a"), END], []], ["finished", "queued"], "in_progress", None),
    ([[Delta(1, 1, "a"), END], [Delta(1, 1, "a"), END]], ["finished", None], "completed", None),
    ([[Delta(1, 1), END], [Finished(1, "length", Usage(1, 0))]], [None, None], "incomplete", None),
    ([[Delta(1, 1)], [Finished(1, "cancelled", Usage(1, 0))]], ["started", None], "cancelled", None),
    ([[Delta(1, 1)], [failed(1)]], ["started", "failed"], "failed", "broken"),
    ([[Delta(1, 1)], []], ["finished", "queued"], "failed", "answer_lost"),
    ([[], []], [None, "queued"], "failed", "answer_lost"),
]


@pytest.mark.parametrize(("journals", "statuses", "status", "code"), STATES)
def test_the_state_of_an_answer(
    redis_url: str,
    journals: list[list[Event]],
    statuses: list[str | None],
    status: str,
    code: str | None,
) -> None:
    """It follows from the journals and from RQ's status of the jobs."""

    async def test(store: Store) -> None:
        jobs = await store.submit(n=2)
        for job, events, rq_status in zip(jobs, journals, statuses, strict=True):
            store.write(job, *events, status=rq_status)
            if rq_status is None:
                store.client.delete(JsonJob.key_for(job.job_id))
        state = await store.answers.state(await store.answers.load(jobs[0].job_id, "ann"))
        assert (state.status, state.error and state.error.code) == (status, code)
        assert state.choices == journals
        assert state.is_ended == (status not in ("queued", "in_progress"))
        assert len(state.finished) == sum(isinstance(e, Finished) for events in journals for e in events)

    run(redis_url, test)


def test_cancelled_while_queued(redis_url: str) -> None:
    """The jobs leave the queue, the journals and the channel say so, and the answer stays readable for its time to live."""

    async def test(store: Store) -> None:
        jobs = await store.submit(n=2, is_detached=True)
        answer = await store.answers.load(jobs[0].job_id, "ann")
        with store.client.pubsub(ignore_subscribe_messages=True) as pubsub:
            pubsub.subscribe(names.stream_channel(answer.id))
            pubsub.get_message(timeout=1)
            await store.answers.cancel(answer)
            assert (await store.answers.state(answer)).status == "cancelled"
            await store.queue.close()
            end = Finished(1, "cancelled", Usage(0, 0))
            messages = [pubsub.get_message(timeout=1) for _ in jobs]
        assert [m and m["data"] for m in messages] == [encode([(job.job_id, end)]) for job in jobs]
        assert JsonQueue("m", connection=store.client).job_ids == []
        state = await store.answers.state(answer)
        assert (state.status, state.choices) == ("cancelled", [[end], [end]])
        assert (await store.answers.load(answer.id, "ann")).is_cancelled
        for key in (names.answer(answer.id), *(names.journal(job.job_id) for job in jobs)):
            assert 50 < store.client.ttl(key) <= 60

    run(redis_url, test)


def test_a_cancellation_after_the_end(redis_url: str) -> None:
    """An answer that is complete stays complete."""

    async def test(store: Store) -> None:
        [job] = await store.submit()
        store.client.lpop(JsonQueue("m", connection=store.client).key)
        store.write(job, Delta(1, 1, "a"), END, status="finished")
        answer = await store.answers.load(job.job_id, "ann")
        await store.answers.cancel(answer)
        await store.queue.close()
        assert (await store.answers.state(answer)).status == "completed"
        assert len((await store.answers.state(answer)).choices[0]) == 2

    run(redis_url, test)


def test_deleting(redis_url: str) -> None:
    """The record, its bytes and its text are gone; a job that waits leaves the queue, and those who follow it see its end."""

    async def test(store: Store) -> None:
        [job] = await store.submit()
        store.write(job, Delta(1, 1, "secret"))
        assert store.total_bytes > 0
        answer = await store.answers.load(job.job_id, "ann")
        await store.answers.delete(answer)
        await store.queue.close()
        with pytest.raises(RequestError):
            await store.answers.load(job.job_id, "ann")
        assert store.total_bytes == 0
        assert store.client.zcard(names.ANSWER_EXPIRIES) == 0
        assert JsonQueue("m", connection=store.client).count == 0
        assert not store.client.exists(names.answer(job.job_id))
        entries = [fields[b"d"] for _, fields in store.client.xrange(names.journal(job.job_id))]
        assert entries == [encode(Finished(1, "cancelled", Usage(0, 0)))]
        assert 0 < store.client.ttl(names.journal(job.job_id)) <= 60

    run(redis_url, test)


def test_deleting_an_answer_while_its_job_runs(redis_url: str) -> None:
    """What the job writes until it is cancelled is gone soon, however long answers are kept."""

    async def test(store: Store) -> None:
        [job] = await store.submit(ttl_seconds=3600)
        store.client.lpop(JsonQueue("m", connection=store.client).key)
        store.write(job, Delta(1, 1, "secret"))
        await store.answers.delete(await store.answers.load(job.job_id, "ann"))
        await store.queue.close()
        store.write(job, Delta(2, 1, "more"), Finished(3, "cancelled", Usage(0, 0)))
        store.client.expire(names.journal(job.job_id), 3600)
        store.end(job, 3600)
        assert 0 < store.client.ttl(names.journal(job.job_id)) <= retention.DELETED_JOURNAL_SECONDS
        assert store.total_bytes == 0

    run(redis_url, test)


def test_how_long_an_answer_lives(redis_url: str) -> None:
    """As long as it may wait and run; once its last job has ended, its own time to live, all of it at once. Repeated reports change nothing."""

    async def test(store: Store) -> None:
        first, second = await store.submit(n=2, ttl_seconds=60)
        answer_id = first.job_id
        key, journals = names.answer(answer_id), [names.journal(job.job_id) for job in (first, second)]
        assert 650 < store.client.ttl(key) <= 660
        store.client.execute_command(*retention.on_start(answer_id, 60))
        running = retention.MAX_RUN_SECONDS + 60
        assert running - 10 < store.client.ttl(key) <= running
        store.write(first, Delta(1, 1, "a"), END)
        store.write(second, Delta(1, 1, "a"))
        for _ in range(2):
            store.end(first)
            assert store.client.ttl(key) > running - 10
            # It is not gone before the other choice is complete.
            assert store.client.ttl(journals[0]) > running - 10
        store.write(second, END)
        estimate = store.total_bytes
        store.end(second)
        assert all(50 < store.client.ttl(each) <= 60 for each in (key, *journals))
        assert (
            store.total_bytes
            == sum(store.client.memory_usage(each, samples=0) for each in (key, *journals))
            != estimate
        )
        # Taken again, for RQ's bookkeeping only.
        store.client.execute_command(*retention.on_start(answer_id, 60))
        assert store.client.ttl(key) <= 60

    run(redis_url, test, queue_seconds=600)


def test_bytes_of_an_answer_with_a_large_record(redis_url: str) -> None:
    """A response repeats its instructions and tools: their bytes are reserved from the beginning, and measured exactly."""

    async def test(store: Store) -> None:
        num_bytes = 500_000
        await store.submit()
        before = store.total_bytes
        retention_options = Retention(ttl_seconds=60, details={"items": []})
        [large] = GenerationRequest(
            model="m",
            prompts=[TextPrompt("x")],
            max_tokens=5,
            stop=[],
            top_logprobs=None,
            sampling=SamplingParams(),
            stream=True,
            ignored=[],
            options=_Options(instructions="x" * num_bytes),
            retention=retention_options,
        ).jobs("front", MODEL, "c", [10])
        record = await store.answers.new_record([large], retention_options, "ann", 10)
        await store.queue.submit([large], 0, record)
        assert num_bytes < store.total_bytes - before < num_bytes + 10_000
        store.end(large)
        measured = store.client.memory_usage(names.answer(large.job_id), samples=0)
        assert int(store.client.hget(names.ANSWER_BYTES, large.job_id)) == measured  # type: ignore[arg-type]
        assert num_bytes < measured < 1.3 * num_bytes

    run(redis_url, test)


def test_details_that_are_large_only_when_decompressed(redis_url: str) -> None:
    """They are decompressed and decoded in a thread: a few bytes in Redis may be megabytes."""

    async def test(store: Store) -> None:
        details = {"x": "a" * 2_000_000, "é": [1]}
        [job] = await store.submit(details=details)
        assert store.client.hstrlen(names.answer(job.job_id), "details") < 20_000
        threads: list[int] = []
        decode = answer_store._decoded_details
        with pytest.MonkeyPatch.context() as patch:

            def noted(data: bytes) -> Any:
                threads.append(threading.get_ident())
                return decode(data)

            patch.setattr(answer_store, "_decoded_details", noted)
            answer = await store.answers.load(job.job_id, "ann")
        assert answer.retention.details == details
        assert threads != [threading.get_ident()]
        assert len(threads) == 1

    run(redis_url, test)


class _Options(msgspec.Struct):
    """A front end's options."""

    instructions: str


def test_a_full_store(redis_url: str) -> None:
    """Refused before anything is queued; what has expired makes room, and a full queue reserves nothing."""

    async def test(store: Store) -> None:
        large = {"x": "".join(chr(48 + (i * i) % 75) for i in range(100))}
        jobs = [(await store.submit(tokens=6000, details=large))[0] for _ in range(2)]  # about 0.4 MB each
        reserved = store.total_bytes
        with pytest.raises(StoreFullError):
            await store.submit(tokens=6000)
        assert JsonQueue("m", connection=store.client).count == 2
        assert store.total_bytes == reserved
        assert len(store.client.keys(names.answer("*"))) == 2
        store.client.zadd(names.ANSWER_EXPIRIES, {jobs[0].job_id: 1})  # as if its time had passed
        store.client.delete(names.answer(jobs[0].job_id))
        await store.submit(tokens=6000)
        with pytest.raises(QueueFullError):
            await store.submit(tokens=100)
        sizes = {k: int(v) for k, v in store.client.hgetall(names.ANSWER_BYTES).items()}
        assert sizes.pop(b"total") == sum(sizes.values())
        assert len(sizes) == store.client.zcard(names.ANSWER_EXPIRIES) == 2

    run(redis_url, test, max_stored_mb=1, max_queued_requests=3)
