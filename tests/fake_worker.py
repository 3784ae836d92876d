"""A scripted worker: speaks the complete protocol through Redis, loads no model and runs in the test's process.

End-to-end tests of the API use it to produce what a real worker rarely does: gaps, repetitions, silence.
"""

from __future__ import annotations

import json
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Self

import msgspec
import redis

from bench.harness.synthetic_worker import SyntheticPromptTokenizer
from common import names
from common.models.model_card import ModelCard
from common.protocol import (
    Cancel,
    Delta,
    Event,
    Failed,
    Finished,
    GenerationJob,
    Started,
    TokenLogprob,
    Usage,
    decode_control,
    encode,
)
from common.rq import JsonJob, JsonQueue
from worker.tokenizing.service import TokenizeService

Script = Callable[[GenerationJob], Iterator[Event | float]]
"""Yields a job's events, and seconds to wait between them."""

WORDS = ["Hello", " there", ",", " caf", "é", "!"]
PROMPT_TOKENS = 7


def words(
    job: GenerationJob, texts: list[str] | None = None, *, pause: float = 0.0
) -> Iterator[Event | float]:
    """A short answer, cut off at max_tokens, with log-probabilities if requested."""
    texts = WORDS if texts is None else texts
    first = 1 if job.journals_started else 0
    yield Started(first, PROMPT_TOKENS, 2)
    limit = min(len(texts), job.max_tokens or len(texts))
    for i, text in enumerate(texts[:limit]):
        own = TokenLogprob(i, -0.5, text.encode()) if job.top_logprobs is not None else None
        top = [TokenLogprob(i + j, -0.5 - j, text.encode() + b"x" * j) for j in range(job.top_logprobs or 0)]
        yield Delta(first + i + 1, i, text, own, top)
        if pause:
            yield pause
    reason = "length" if limit < len(texts) else "stop"
    yield Finished(first + limit + 1, reason, Usage(PROMPT_TOKENS, limit, 2))


class FakeWorker:
    """See the module.

    Attributes:
        jobs: Jobs that were taken, in order.
        cancelled: Monotonic seconds of each job's cancellation, by job id.
    """

    def __init__(
        self,
        url: str,
        model: str = "fake",
        script: Script = words,
        *,
        context: int = 4096,
        vocab_size: int = 1000,
    ) -> None:
        self.model = model
        self.script = script
        self.jobs: list[GenerationJob] = []
        self.cancelled: dict[str, float] = {}
        self._redis = redis.Redis.from_url(url)
        self._queue = JsonQueue(model, connection=self._redis)
        self._card = ModelCard(
            id=model,
            worker=f"fake-{model}-{id(self):x}",
            created=1_700_000_000,
            context_length=context,
            vocab_size=vocab_size,
            max_batch=8,
            free_slots=8,
            quantization="none",
            can_tokenize=True,
            sampling_defaults='{"temperature":0.25,"top_k":7}',
        )
        self._is_over = threading.Event()
        self._runs: list[threading.Thread] = []
        tokenizing = TokenizeService(
            self._redis,
            model,
            lambda: SyntheticPromptTokenizer(is_obedient=False, sleep=time.sleep),
            draining=self._is_over.is_set,
        )
        loops = (self._beat, self._take, self._listen, tokenizing.run)
        self._threads = [threading.Thread(target=self._survive_outages, args=(loop,)) for loop in loops]

    def __enter__(self) -> Self:
        self.show_card()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._is_over.set()
        for thread in [*self._threads, *self._runs]:
            thread.join()
        self._redis.delete(names.worker_card(self._card.worker))
        self._redis.close()

    def show_card(self) -> None:
        """Writes the model card, which says that this worker lives."""
        now = time.time()
        with self._redis.pipeline() as pipe:
            pipe.hset(names.worker_card(self._card.worker), mapping=self._card.to_hash())
            pipe.expire(names.worker_card(self._card.worker), names.CARD_SECONDS)
            pipe.zadd(names.WORKER_CARDS, {self._card.worker: now})
            pipe.zadd(names.KNOWN_MODELS, {self.model: now})
            pipe.execute()

    def publish(self, job: GenerationJob, event: Event, *, journal: bool = True, live: bool = True) -> int:
        """Journals and publishes one event; returns the number of subscribers."""
        if journal and event.n > 0:
            key = names.journal(job.job_id)
            self._redis.xadd(key, {"x": "fake", "d": encode(event)}, id=f"{event.n}-0")
            self._redis.expire(key, 300)
        if not live:
            return 0
        return int(self._redis.publish(job.channel, encode([(job.job_id, event)])))

    def _survive_outages(self, loop: Callable[[], None]) -> None:
        while not self._is_over.is_set():
            try:
                loop()
            except redis.ConnectionError:
                self._is_over.wait(0.1)

    def _beat(self) -> None:
        while not self._is_over.wait(0.5):
            self.show_card()

    def _take(self) -> None:
        while not self._is_over.is_set():
            taken = self._redis.blpop([self._queue.key], timeout=0.2)
            if taken is None:
                continue
            job_id = taken[1].decode()
            fields = self._redis.hgetall(JsonJob.key_for(job_id))
            if not fields:
                continue
            _, _, _, arguments = json.loads(zlib.decompress(fields[b"data"]))
            job = msgspec.convert(arguments, GenerationJob, str_keys=True)
            self._redis.hset(JsonJob.key_for(job_id), "status", "started")
            self._redis.persist(JsonJob.key_for(job_id))
            self.jobs.append(job)
            self._runs.append(threading.Thread(target=self._run, args=(job,)))
            self._runs[-1].start()

    def _run(self, job: GenerationJob) -> None:
        status = "started"
        for step in self.script(job):
            if job.job_id in self.cancelled or self._is_over.is_set():
                return
            if isinstance(step, float | int):
                self._wait(job, step)
                continue
            if isinstance(step, Finished | Failed):
                status = "finished" if isinstance(step, Finished) else "failed"
            self.publish(job, step)
        self._redis.hset(JsonJob.key_for(job.job_id), "status", status)

    def _wait(self, job: GenerationJob, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._is_over.is_set() and job.job_id not in self.cancelled:
            time.sleep(min(0.01, max(0.0, until - time.monotonic())))

    def _listen(self) -> None:
        with self._redis.pubsub(ignore_subscribe_messages=True) as pubsub:
            pubsub.subscribe(names.control_channel(self.model))
            while not self._is_over.is_set():
                message = pubsub.get_message(timeout=0.1)
                if message is not None and message["type"] == "message":
                    control: Cancel = decode_control(message["data"])
                    for job_id in control.job_ids:
                        self.cancelled.setdefault(job_id, time.monotonic())
