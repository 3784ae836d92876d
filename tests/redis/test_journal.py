"""The one script call per step against real servers: what is written once, what is refused, what is published."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import redis
from rq.defaults import RQ_KEY_PREFIX

from common import connections, names
from common.protocol import Delta, decode_step, encode
from worker.jobs.redis_journal import RedisJournal, Row

CHANNEL = "mlxpool:api:test"


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with connections.connect(redis_url) as connected:
        yield connected


@pytest.fixture
def journal(client: redis.Redis) -> Iterator[RedisJournal]:
    made = RedisJournal(client)
    yield made
    made.close()


def give_lease(client: redis.Redis, job_id: str, execution_id: str) -> str:
    key = f"{RQ_KEY_PREFIX}:execution:{job_id}:{execution_id}"
    client.hset(key, "id", execution_id)
    return key


def row(job_id: str, n: int, text: str = "x", execution_id: str = "execution-1", **options: Any) -> Row:
    return Row(options.pop("channel", CHANNEL), job_id, execution_id, n, encode(Delta(n, n, text)), **options)


def written(client: redis.Redis, job_id: str) -> list[bytes]:
    entries: Any = client.xrange(names.journal(job_id))
    return [entry_id for entry_id, _ in entries]


def exchange(journal: RedisJournal, *rows: Row) -> set[str]:
    journal.send(rows)
    return journal.collect().refused


def test_a_step_is_journaled_and_published(client: redis.Redis, journal: RedisJournal) -> None:
    """One call writes a step of several jobs and publishes it as one message, any text in it, to who listens."""
    pubsub = client.pubsub(ignore_subscribe_messages=True)
    pubsub.subscribe(CHANNEL)
    pubsub.get_message(timeout=5)
    for job_id in ("a", "b"):
        give_lease(client, job_id, "execution-1")
    text = 'größer "🌊"\n\u2028\\'
    journal.send([row("a", 1, text), row("b", 1), row("c", 1, channel="mlxpool:api:other")])
    receipt = journal.collect()
    message: Any = pubsub.get_message(timeout=5)
    assert decode_step(message["data"]) == [("a", Delta(1, 1, text)), ("b", Delta(1, 1, "x"))]
    assert receipt.refused == {"execution-1"}  # of c, which nobody holds
    assert receipt.listeners == {CHANNEL: 1}
    assert written(client, "a") == [b"1-0"]
    pubsub.close()


def test_without_the_lease_nothing_is_written(client: redis.Redis, journal: RedisJournal) -> None:
    """A writer whose execution is gone is refused, for the journal and for the channel."""
    key = give_lease(client, "a", "execution-1")
    assert exchange(journal, row("a", 1)) == set()
    client.delete(key)
    assert exchange(journal, row("a", 2)) == {"execution-1"}
    assert written(client, "a") == [b"1-0"]


def test_the_second_writer_of_an_n_is_refused(client: redis.Redis, journal: RedisJournal) -> None:
    """Two workers that both believe in their lease: each n is written once, the later one stops."""
    for execution_id in ("first-writer", "other-writer"):
        give_lease(client, "a", execution_id)
    assert exchange(journal, row("a", 1, "mine", "first-writer")) == set()
    assert exchange(journal, row("a", 1, "theirs", "other-writer")) == {"other-writer"}
    entries: Any = client.xrange(names.journal("a"))
    assert [b"mine" in fields[b"d"] for _, fields in entries] == [True]


def test_a_repeated_call_is_not_doubled(client: redis.Redis, journal: RedisJournal) -> None:
    """After a dropped connection the unanswered call is sent again; what was written before counts as ours."""
    give_lease(client, "a", "execution-1")
    assert exchange(journal, row("a", 1)) == set()
    journal.send([row("a", 2)])
    client.client_kill_filter(_type="normal", skipme=True)
    assert journal.collect().refused == set()
    assert exchange(journal, row("a", 3)) == set()
    assert written(client, "a") == [b"1-0", b"2-0", b"3-0"]


def test_a_server_that_forgot_its_scripts(client: redis.Redis, journal: RedisJournal) -> None:
    """A restart or SCRIPT FLUSH costs a round trip, not a token."""
    give_lease(client, "a", "execution-1")
    assert exchange(journal, row("a", 1)) == set()
    client.script_flush()
    assert exchange(journal, row("a", 2)) == set()
    assert written(client, "a") == [b"1-0", b"2-0"]


def test_a_server_that_lost_its_last_moments(client: redis.Redis, journal: RedisJournal) -> None:
    """After a lost connection a gap is refused: the job goes on from what the journal really has."""
    give_lease(client, "a", "execution-1")
    for n in (1, 2, 3):
        assert exchange(journal, row("a", n)) == set()
    client.xdel(names.journal("a"), "3-0")
    client.client_kill_filter(_type="normal", skipme=True)
    assert exchange(journal, row("a", 4)) == {"execution-1"}
    assert written(client, "a") == [b"1-0", b"2-0"]


def test_published_only(client: redis.Redis, journal: RedisJournal) -> None:
    """n = 0 is heard and not written."""
    give_lease(client, "a", "execution-1")
    assert exchange(journal, row("a", 0)) == set()
    assert written(client, "a") == []


def test_time_to_live(client: redis.Redis, journal: RedisJournal) -> None:
    """A journal lives as long as its last row with a time says."""
    give_lease(client, "a", "execution-1")
    exchange(journal, row("a", 1, ttl_seconds=900))
    exchange(journal, row("a", 2))
    assert 890 < int(client.ttl(names.journal("a"))) <= 900  # type: ignore[arg-type]
    exchange(journal, row("a", 3, ttl_seconds=300))
    assert 290 < int(client.ttl(names.journal("a"))) <= 300  # type: ignore[arg-type]


def test_giving_up_on_a_redis_that_is_gone(client: redis.Redis) -> None:
    """A worker that ends does not wait for ever."""
    journal = RedisJournal(client, given_up=lambda: True)
    client.connection_pool.connection_kwargs["port"] = 1
    gone = RedisJournal(client, given_up=lambda: True)
    journal.close()
    gone.send([row("a", 1)])
    with pytest.raises(redis.ConnectionError):
        gone.collect()
