"""The model directory: live workers' cards, and models without a worker."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator

import msgspec
import pytest
import redis

from api.generation.command_batch import CommandBatch
from api.generation.model_directory import ModelDirectory
from common import connections, names
from common.errors import RequestError
from common.models import model_aliases
from common.models.model_card import ModelCard

CARD = ModelCard(
    id="org/a",
    worker="w1",
    created=100,
    context_length=4096,
    vocab_size=1000,
    max_batch=8,
    free_slots=3,
    quantization="4-bit",
)


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as connected:
        yield connected


def show(client: redis.Redis, *cards: ModelCard) -> None:
    for card in cards:
        client.hset(names.worker_card(card.worker), mapping=card.to_hash())
        client.zadd(names.WORKER_CARDS, {card.worker: time.time()})
        client.zadd(names.KNOWN_MODELS, {card.id: time.time()})


def run(
    url: str,
    test: Callable[[ModelDirectory], Awaitable[None]],
    default: str | None = None,
    aliases: str | None = None,
) -> None:
    async def with_directory() -> None:
        connected = connections.connect_async(url)
        directory = ModelDirectory(
            CommandBatch(connected, transaction=False), default, model_aliases.parse(aliases)
        )
        await directory.start()
        try:
            await test(directory)
        finally:
            await directory.stop()
            await connected.aclose()

    asyncio.run(with_directory())


async def refusal(directory: ModelDirectory, name: str | None) -> tuple[int, str | None, str | None]:
    with pytest.raises(RequestError) as raised:
        await directory.resolve(name)
    return raised.value.status, raised.value.code, raised.value.param


def test_workers_of_a_model_are_one_model(redis_url: str, client: redis.Redis) -> None:
    """Its capabilities are those that all workers have; an expired card does not count."""
    replace = msgspec.structs.replace
    show(
        client,
        CARD,
        replace(CARD, worker="w2", created=50, context_length=2048, vocab_size=900, free_slots=1),
    )
    show(client, replace(CARD, worker="w3", id="gone"))
    client.delete(names.worker_card("w3"))

    async def test(directory: ModelDirectory) -> None:
        [model] = directory.current()
        assert (model.id, model.num_workers, model.created) == ("org/a", 2, 50)
        assert (model.free_slots, model.busy_slots) == (4, 12)
        assert (model.context_length, model.vocab_size, model.quantization) == (2048, 900, "4-bit")
        assert await refusal(directory, "gone") == (503, "model_unavailable", None)
        assert await refusal(directory, "never") == (404, "model_not_found", "model")

    run(redis_url, test)


def test_a_new_worker_is_seen_at_once(redis_url: str, client: redis.Redis) -> None:
    """A request for an unknown model refreshes the directory, once for all concurrent requests."""

    async def test(directory: ModelDirectory) -> None:
        assert directory.served == []
        await asyncio.to_thread(show, client, CARD)
        models = await asyncio.gather(*(directory.resolve("org/a") for _ in range(50)))
        assert {model.id for model in models} == {"org/a"}

    run(redis_url, test)


def test_a_malformed_card_is_skipped(
    redis_url: str, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged once, and the other workers are served."""
    show(client, CARD)
    client.hset(names.worker_card("bad"), mapping={"id": "x", "max_batch": "many"})
    client.zadd(names.WORKER_CARDS, {"bad": time.time()})

    async def test(directory: ModelDirectory) -> None:
        for _ in range(3):
            await refusal(directory, "x")
        assert [model.id for model in directory.served] == ["org/a"]
        assert directory._bad_cards == {"bad"}
        client.zrem(names.WORKER_CARDS, "bad")
        await refusal(directory, "x")
        assert not directory._bad_cards  # a worker that is gone takes no memory

    run(redis_url, test)
    assert sum("bad" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("name", [None, "default_model", "default"])
def test_a_request_that_names_no_model(redis_url: str, client: redis.Redis, name: str | None) -> None:
    """The default model is used, or the only one; with none or several the error lists the models."""

    async def none(directory: ModelDirectory) -> None:
        assert await refusal(directory, name) == (400, None, "model")

    async def one(directory: ModelDirectory) -> None:
        assert (await directory.resolve(name)).id == "org/a"

    async def several(directory: ModelDirectory) -> None:
        with pytest.raises(RequestError, match="b, org/a"):
            await directory.resolve(name)
        assert await refusal(directory, name) == (400, None, "model")

    async def absent(directory: ModelDirectory) -> None:
        assert await refusal(directory, name) == (503, "model_unavailable", None)

    run(redis_url, none)
    show(client, CARD)
    run(redis_url, one)
    show(client, msgspec.structs.replace(CARD, id="b", worker="w2"))
    run(redis_url, several)
    run(redis_url, one, default="org/a")
    run(redis_url, absent, default="soon")


def test_aliases(redis_url: str, client: redis.Redis) -> None:
    """A plain alias, then wildcards in order; a model that is served, or was lately, keeps its name."""
    show(client, CARD, msgspec.structs.replace(CARD, id="b", worker="w2"))
    client.zadd(names.KNOWN_MODELS, {"claude-own": time.time()})

    async def test(directory: ModelDirectory) -> None:
        resolved = {
            name: (await directory.resolve(name)).id for name in ("org/a", "fast", "claude-4", "x", "default")
        }
        assert resolved == {"org/a": "org/a", "fast": "b", "claude-4": "org/a", "x": "b", "default": "b"}
        assert await refusal(directory, "claude-own") == (503, "model_unavailable", None)
        assert await refusal(directory, "later") == (503, "model_unavailable", None)
        assert [(alias, model.id) for alias, model in directory.aliases] == [("b2", "b"), ("fast", "b")]

    aliases = "fast=b, b2=b, claude-*=org/a, *=b, org/a=b, later=absent"
    run(redis_url, test, default="fast", aliases=aliases)


def test_an_alias_needs_no_look_at_redis(redis_url: str, client: redis.Redis) -> None:
    """A name that is not served makes the directory read all cards, unless an alias answers it."""
    show(client, CARD)

    async def test(directory: ModelDirectory) -> None:
        read = directory._refresh
        await directory.resolve("fast")
        await directory.resolve("anything")
        assert directory._refresh is read

    run(redis_url, test, aliases="fast=org/a,*=org/a")


@pytest.mark.parametrize(
    ("text", "defaults"),
    [
        ('{"temperature":0.6,"top_k":20}', {"temperature": 0.6, "top_k": 20}),
        ("", {}),
        ("[" * 5000, {}),
        ('{"temperature":"hot","seed":1,"top_p":5,"min_p":0.5}', {"min_p": 0.5}),
    ],
)
def test_sampling_defaults_of_a_card(
    redis_url: str, client: redis.Redis, text: str, defaults: dict[str, float]
) -> None:
    """Only defaults within a request's ranges are taken from a card; whole numbers stay whole."""
    show(client, msgspec.structs.replace(CARD, sampling_defaults=text))

    async def test(directory: ModelDirectory) -> None:
        [model] = directory.current()
        assert model.sampling_defaults == defaults
        assert type(model.sampling_defaults.get("top_k", 0)) is int

    run(redis_url, test)


def test_without_a_server() -> None:
    """No request is answered 404 only because Redis is unavailable."""

    async def test(directory: ModelDirectory) -> None:
        assert await refusal(directory, "org/a") == (503, "queue_unavailable", None)
        assert await refusal(directory, None) == (503, "queue_unavailable", None)
        assert directory.served == []

    run("redis://127.0.0.1:1/0", test)


def test_a_foreign_card_hides_no_other(redis_url: str, client: redis.Redis) -> None:
    """Names that are not text, a card that is not a hash, invalid numbers: the valid card is still served."""
    show(client, CARD)
    client.zadd(names.WORKER_CARDS, {b"\xff": time.time(), "stringy": time.time(), "odd": time.time()})
    client.zadd(names.KNOWN_MODELS, {b"\xfe": time.time()})
    client.set(names.worker_card("stringy"), "x")
    odd = msgspec.structs.replace(CARD, worker="odd", vocab_size=0)
    client.hset(names.worker_card("odd"), mapping=odd.to_hash())

    async def test(directory: ModelDirectory) -> None:
        assert [(model.id, model.num_workers) for model in directory.served] == [("org/a", 1)]

    run(redis_url, test)
