"""`RedisJournal` against real servers: what is appended once, what is refused, what is published."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import redis
from rq.defaults import RQ_KEY_PREFIX

from common import connections, names
from common.protocol import Delta, decode_event, decode_step, encode
from worker.jobs.redis_journal import RedisJournal
from worker.loop.journal import JournalEntry

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


def entry(
    job_id: str, n: int, text: str = "x", execution_id: str = "execution-1", **options: Any
) -> JournalEntry:
    return JournalEntry(
        options.pop("channel", CHANNEL),
        job_id,
        execution_id,
        n,
        encode(Delta(n, n, text)).decode(),
        **options,
    )


def stream_ids(client: redis.Redis, job_id: str) -> list[bytes]:
    entries: Any = client.xrange(names.journal(job_id))
    return [stream_id for stream_id, _ in entries]


def append(journal: RedisJournal, *entries: JournalEntry) -> set[str]:
    journal.send(entries)
    return journal.collect().refused


def test_a_step_is_journaled_and_published(client: redis.Redis, journal: RedisJournal) -> None:
    """One call appends a step of several jobs and publishes it as one message; any text survives."""
    pubsub = client.pubsub(ignore_subscribe_messages=True)
    pubsub.subscribe(CHANNEL)
    pubsub.get_message(timeout=5)
    for job_id in ("a", "b"):
        give_lease(client, job_id, "execution-1")
    text = 'größer "🌊"\n\u2028\\'
    journal.send([entry("a", 1, text), entry("b", 1), entry("c", 1, channel="mlxpool:api:other")])
    result = journal.collect()
    message: Any = pubsub.get_message(timeout=5)
    assert decode_step(message["data"]) == [("a", Delta(1, 1, text)), ("b", Delta(1, 1, "x"))]
    assert result.refused == {"execution-1"}  # of job c, which has no lease
    assert result.listeners == {CHANNEL: 1}
    assert stream_ids(client, "a") == [b"1-0"]
    pubsub.close()


def test_nothing_is_written_without_the_lease(client: redis.Redis, journal: RedisJournal) -> None:
    """Entries of a writer whose lease is gone are neither appended nor published."""
    key = give_lease(client, "a", "execution-1")
    assert append(journal, entry("a", 1)) == set()
    client.delete(key)
    assert append(journal, entry("a", 2)) == {"execution-1"}
    assert stream_ids(client, "a") == [b"1-0"]


def test_entries_of_any_size(client: redis.Redis, journal: RedisJournal) -> None:
    """Every form of MessagePack that an entry needs reaches the journal: large numbers, short, long and very long text."""
    give_lease(client, "a", "execution-1")
    texts = {1: "", 200: "x" * 20, 70_000: "ü" * 300, 5_000_000_000: "x" * 70_000}
    assert append(journal, *(entry("a", n, text) for n, text in texts.items())) == set()
    entries: Any = client.xrange(names.journal("a"))
    written = [decode_event(fields[b"d"]) for _, fields in entries]
    assert written == [Delta(n, n, text) for n, text in texts.items()]
    assert stream_ids(client, "a")[-1] == b"5000000000-0"


def test_the_second_writer_of_an_n_is_refused(client: redis.Redis, journal: RedisJournal) -> None:
    """Two workers that both hold a lease for a job: each n is written once, and the second writer is refused."""
    for execution_id in ("first-writer", "other-writer"):
        give_lease(client, "a", execution_id)
    assert append(journal, entry("a", 1, "mine", "first-writer")) == set()
    assert append(journal, entry("a", 1, "theirs", "other-writer")) == {"other-writer"}
    entries: Any = client.xrange(names.journal("a"))
    assert [b"mine" in fields[b"d"] for _, fields in entries] == [True]


def test_a_repeated_call_writes_nothing_twice(client: redis.Redis, journal: RedisJournal) -> None:
    """After a lost connection the unanswered call is repeated; entries that it already wrote count as accepted."""
    give_lease(client, "a", "execution-1")
    assert append(journal, entry("a", 1)) == set()
    journal.send([entry("a", 2)])
    client.client_kill_filter(_type="normal", skipme=True)
    assert journal.collect().refused == set()
    assert append(journal, entry("a", 3)) == set()
    assert stream_ids(client, "a") == [b"1-0", b"2-0", b"3-0"]


def test_missing_script_is_loaded_again(client: redis.Redis, journal: RedisJournal) -> None:
    """After a restart or SCRIPT FLUSH the script is loaded again; no token is lost."""
    give_lease(client, "a", "execution-1")
    assert append(journal, entry("a", 1)) == set()
    client.script_flush()
    assert append(journal, entry("a", 2)) == set()
    assert stream_ids(client, "a") == [b"1-0", b"2-0"]


def test_gap_after_lost_writes_is_refused(client: redis.Redis, journal: RedisJournal) -> None:
    """Redis lost its last writes with a connection: an entry that would leave a gap is refused."""
    give_lease(client, "a", "execution-1")
    for n in (1, 2, 3):
        assert append(journal, entry("a", n)) == set()
    client.xdel(names.journal("a"), "3-0")
    client.client_kill_filter(_type="normal", skipme=True)
    assert append(journal, entry("a", 4)) == {"execution-1"}
    assert stream_ids(client, "a") == [b"1-0", b"2-0"]


def test_event_without_a_number_is_published_only(client: redis.Redis, journal: RedisJournal) -> None:
    """An event with n = 0 is published and not appended."""
    give_lease(client, "a", "execution-1")
    assert append(journal, entry("a", 0)) == set()
    assert stream_ids(client, "a") == []


def test_time_to_live(client: redis.Redis, journal: RedisJournal) -> None:
    """The last entry with a time to live sets the journal's."""
    give_lease(client, "a", "execution-1")
    append(journal, entry("a", 1, ttl_seconds=900))
    append(journal, entry("a", 2))
    assert 890 < int(client.ttl(names.journal("a"))) <= 900  # type: ignore[arg-type]
    append(journal, entry("a", 3, ttl_seconds=300))
    assert 290 < int(client.ttl(names.journal("a"))) <= 300  # type: ignore[arg-type]


def test_stop_waiting_for_redis(client: redis.Redis) -> None:
    """A worker that is ending does not wait for Redis for ever."""
    journal = RedisJournal(client, stop_waiting=lambda: True)
    client.connection_pool.connection_kwargs["port"] = 1
    gone = RedisJournal(client, stop_waiting=lambda: True)
    journal.close()
    gone.send([entry("a", 1)])
    with pytest.raises(redis.ConnectionError):
        gone.collect()
