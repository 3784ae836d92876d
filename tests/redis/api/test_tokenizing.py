"""Tokens of prompts through real servers: the API's client and the workers' tokenizing thread."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import pytest

from api.generation.command_batch import CommandBatch
from api.generation.served_model import ServedModel
from api.tokenizing import client as tokenize_client
from api.tokenizing.client import TokenizeClient
from common import connections, names
from common.errors import RequestError
from common.protocol import TextPrompt, TokenizeRequest, encode
from tests.redis.pool_of_workers import Workers, wait_until

T = TypeVar("T")

MODEL = ServedModel(
    id="m",
    created=0,
    context_length=1000,
    vocab_size=1000,
    num_workers=1,
    free_slots=0,
    quantization="",
    can_tokenize=True,
)
WAIT_SECONDS = (0.5, 5.0)


@pytest.fixture
def workers(redis_url: str) -> Iterator[Workers]:
    with Workers(redis_url) as pool:
        yield pool


def ask(
    workers: Workers,
    question: Callable[[TokenizeClient], Awaitable[T]],
    wait_seconds: tuple[float, ...] = WAIT_SECONDS,
) -> T:
    """What a client of the API process learns."""

    async def run() -> T:
        connection = connections.connect_async(workers.url)
        client = TokenizeClient(connection, CommandBatch(connection, transaction=False), wait_seconds)
        try:
            return await question(client)
        finally:
            await client.stop()
            await connection.aclose()

    return asyncio.run(run())


def test_tokens_strings_and_text(workers: Workers) -> None:
    """Text to tokens and back, with the strings of tokens if they are asked for."""
    workers.start()
    counted = ask(workers, lambda client: client.count(MODEL, TextPrompt("a b c")))
    assert (counted.count, counted.token_ids, counted.token_strings) == (3, [], [])
    tokens = ask(
        workers,
        lambda client: client.count(MODEL, TextPrompt("a b"), returns_tokens=True, returns_strings=True),
    )
    assert (tokens.token_ids, tokens.token_strings) == ([1, 2], ["1", "2"])
    assert ask(workers, lambda client: client.text(MODEL, [7, 8])) == " 7 8"


def test_no_slot_is_needed(workers: Workers) -> None:
    """A worker whose only slot is taken, with more jobs waiting, answers at once."""
    workers.start("m", 50, max_batch=1)
    jobs = [workers.submit(max_tokens=500) for _ in range(3)]
    wait_until(lambda: workers.free_slots() == [0])
    began = time.monotonic()
    assert ask(workers, lambda client: client.count(MODEL, TextPrompt("a b c"))).count == 3
    assert time.monotonic() - began < 2.0
    assert not workers.has_ended(*jobs)


def test_many_at_once(workers: Workers) -> None:
    """Each of many questions gets its own reply, with two workers and one connection for the replies."""
    workers.start()
    workers.start()

    async def all_of(client: TokenizeClient) -> list[int]:
        counts = (client.count(MODEL, TextPrompt("x " * n)) for n in range(200))
        return [each.count for each in await asyncio.gather(*counts)]

    assert ask(workers, all_of) == list(range(200))
    assert workers.client.keys("mlxpool:tokenize*") == []


def test_a_killed_worker(workers: Workers) -> None:
    """The worker that took the request dies while it tokenizes: it is sent again, and another one replies."""
    victim = workers.start("m", 50, "--obey")

    def is_taken() -> bool:
        is_listed = workers.client.llen(names.tokenize_queue("m")) > 0
        return not is_listed and bool(workers.client.keys(names.tokenize_request("*")))

    async def killed_and_asked_again(client: TokenizeClient) -> int:
        reply = asyncio.ensure_future(client.count(MODEL, TextPrompt("one two hang 0")))
        await asyncio.to_thread(wait_until, is_taken)
        victim.send(signal.SIGKILL)
        await asyncio.to_thread(victim.process.wait)
        await asyncio.to_thread(workers.start)  # it does not obey: it counts
        return (await reply).count

    assert ask(workers, killed_and_asked_again, (0.5, 10.0)) == 4


def test_a_sleeping_worker(workers: Workers) -> None:
    """A stopped process may be given the request, as its connection still blocks on the list: another one replies."""
    sleeper = workers.start()
    wait_until(lambda: _num_blocked(workers) >= 1)
    sleeper.send(signal.SIGSTOP)
    workers.start()
    for _ in range(2):
        assert ask(workers, lambda client: client.count(MODEL, TextPrompt("a b"))).count == 2


def _num_blocked(workers: Workers) -> int:
    info: Any = workers.client.info("clients")
    return int(info["blocked_clients"])


def test_no_reply_is_a_503(workers: Workers) -> None:
    """Without a worker the last attempt ends in an error, and the request is deleted."""
    with pytest.raises(RequestError) as raised:
        ask(workers, lambda client: client.count(MODEL, TextPrompt("a")), (0.1, 0.1))
    assert (raised.value.status, raised.value.code) == (503, "tokenizing_timeout")
    assert workers.client.keys(names.tokenize_request("*")) == []
    assert workers.client.llen(names.tokenize_queue("m")) == 1  # an id alone: a worker skips it
    assert 0 < workers.client.ttl(names.tokenize_queue("m")) <= names.TOKENIZE_SECONDS


def test_workers_of_older_versions(workers: Workers) -> None:
    """A 503 at once if no worker's card says that it tokenizes for clients; nothing is sent."""
    old = ServedModel("old", 0, 1000, 1000, 1, 0, "")
    with pytest.raises(RequestError) as raised:
        ask(workers, lambda client: client.count(old, TextPrompt("a")))
    assert (raised.value.status, raised.value.code) == (503, "tokenizing_unavailable")
    assert workers.client.keys("mlxpool:tokenize*") == []


@pytest.mark.parametrize(("limit", "value"), [("MAX_WAITING", 2), ("MAX_WAITING_BYTES", 500)])
def test_a_full_list_is_a_503(
    workers: Workers, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    """Neither the number nor the size of waiting requests grows without bound; repeating a request adds none."""
    monkeypatch.setattr(tokenize_client, limit, value)

    async def three(client: TokenizeClient) -> list[Any]:
        return await asyncio.gather(
            *(client.count(MODEL, TextPrompt("a" * 50)) for _ in range(3)), return_exceptions=True
        )

    codes = [error.code for error in ask(workers, three, (0.2, 0.2))]
    assert "tokenizing_busy" in codes
    assert "tokenizing_timeout" in codes
    assert workers.client.llen(names.tokenize_queue("m")) == codes.count("tokenizing_timeout")


def test_expired_requests_are_skipped(workers: Workers) -> None:
    """A worker that starts late leaves requests alone whose time is over."""
    workers.client.rpush(names.tokenize_queue("m"), "0" * 32)
    workers.start()
    wait_until(lambda: workers.client.llen(names.tokenize_queue("m")) == 0)
    assert workers.client.keys(names.tokenized("*")) == []


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\xff",
        b"[" * 5000,
        b'{"request_id": "ab"}',
        b'{"request_id":"00000000","process_id":"../../x","prompt":{"type":"text","text":"x"}}',
        b'{"request_id":"00000000","process_id":"00000000","prompt":{"type":"pickle"}}',
    ],
)
def test_garbage_in_redis(workers: Workers, garbage: bytes) -> None:
    """What is not a request is skipped, and the next one is answered."""
    worker = workers.start()
    workers.client.set(names.tokenize_request("garbage"), garbage)
    workers.client.rpush(names.tokenize_queue("m"), "garbage")
    assert ask(workers, lambda client: client.count(MODEL, TextPrompt("a b"))).count == 2
    assert worker.process.poll() is None
    assert workers.client.keys(names.tokenized("*")) == []


def test_garbage_replies(workers: Workers, caplog: pytest.LogCaptureFixture) -> None:
    """A reply that cannot be read, or that belongs to no request, is dropped; the right one still arrives."""
    workers.start()

    async def with_garbage(client: TokenizeClient) -> int:
        await client.count(MODEL, TextPrompt("a"))
        key = names.tokenized(client._process_id)
        workers.client.rpush(key, b"not JSON", b'{"request_id": "unknown"}')
        return (await client.count(MODEL, TextPrompt("a b"))).count

    with caplog.at_level(logging.WARNING):
        assert ask(workers, with_garbage) == 2
    assert "cannot be read" in caplog.text


def test_a_hanging_tokenizer_ends_the_worker(workers: Workers) -> None:
    """As for a prompt that hangs in intake: the watchdog ends the worker, so that its jobs are taken over."""
    worker = workers.start("m", 50, "--obey", stall_seconds=1)
    request = TokenizeRequest(
        request_id="0" * 32, process_id="0" * 16, prompt=TextPrompt("hang 0"), adds_special_tokens=False
    )
    workers.client.set(names.tokenize_request("0" * 32), encode(request))
    workers.client.rpush(names.tokenize_queue("m"), "0" * 32)
    wait_until(lambda: worker.process.poll() is not None)
    assert worker.process.returncode == 4
