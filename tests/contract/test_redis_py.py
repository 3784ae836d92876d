"""redis-py 8.1: what `common/connections.py`, the journal, the relay and the command batch rely on. The server is scripted."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import redis
from redis.connection import UnixDomainSocketConnection
from redis.exceptions import NoScriptError

from common import connections
from tests.contract.resp_server import HANGS_UP, RespServer

OK = b"+OK\r\n"


def test_nothing_is_sent_twice() -> None:
    """A command whose reply was lost may have been executed: with our options it is never sent again.

    redis-py repeats by default: a MULTI that enqueues would run twice. Open common/connections.py.
    """
    with RespServer(lambda _: HANGS_UP) as server, connections.connect(server.url) as client:
        with pytest.raises(redis.ConnectionError):
            client.rpush("k", "v")
        with pytest.raises(redis.ConnectionError):
            client.pipeline(transaction=False).rpush("k", "v").rpush("k", "v").execute()
    assert [command[0] for command in server.commands].count(
        "RPUSH"
    ) == 2  # the server closes the connection at the first command


def test_nothing_is_sent_twice_by_asyncio() -> None:
    """The same for the API's client. Open common/connections.py."""

    async def push(url: str) -> None:
        client = connections.connect_async(url)
        try:
            with pytest.raises(redis.ConnectionError):
                await client.rpush("k", "v")
        finally:
            await client.aclose()

    with RespServer(lambda _: HANGS_UP) as server:
        asyncio.run(push(server.url))
    assert server.commands == [["RPUSH", "k", "v"]]


def test_default_repeats() -> None:
    """Why `retry` is passed: redis-py's default repeats commands. If this fails, it need not be passed. Open common/connections.py."""
    with redis.Redis() as client:
        assert client.get_retry().get_retries() > 0


def test_unix_sockets_take_no_keep_alive() -> None:
    """`socket_keepalive` is omitted for Unix sockets. If this fails, `_options` can always pass it. Open common/connections.py."""
    with pytest.raises(TypeError, match="socket_keepalive"):
        UnixDomainSocketConnection(path="/nowhere", socket_keepalive=True)
    with connections.connect("unix:///nowhere") as client:
        assert client.connection_pool.make_connection().path == "/nowhere"


def test_connection_options_are_visible() -> None:
    """Sentences about an unreachable Redis name it from the pool's `connection_kwargs`. Open common/connections.py, `_where`."""
    with connections.connect("redis://:secret@mac:6380/1") as client:
        options = client.connection_pool.connection_kwargs
    assert (options["host"], options["port"], options["db"], options["password"]) == (
        "mac",
        6380,
        1,
        "secret",
    )
    assert options["socket_keepalive"] is True
    with connections.connect("unix:///tmp/redis.sock") as client:
        assert client.connection_pool.connection_kwargs["path"] == "/tmp/redis.sock"  # noqa: S108 (not opened)


@pytest.mark.parametrize("url", ["http://mac", "redis://mac:port/0", "nothing"])
def test_bad_urls_are_value_errors(url: str) -> None:
    """`connect` turns this into a sentence about MLXPOOL_REDIS_URL. Open common/connections.py."""
    with pytest.raises(ValueError):  # noqa: PT011 (any message)
        redis.Redis.from_url(url)
    with pytest.raises(ValueError):  # noqa: PT011
        redis.asyncio.Redis.from_url(url)


def test_errors_are_a_family() -> None:
    """`except RedisError` catches all of them; an AuthenticationError is a ConnectionError. Open common/connections.py, `check`."""
    for error in (
        redis.ConnectionError,
        redis.TimeoutError,
        redis.ResponseError,
        redis.WatchError,
        NoScriptError,
    ):
        assert issubclass(error, redis.RedisError)
    assert issubclass(redis.AuthenticationError, redis.ConnectionError)
    assert issubclass(NoScriptError, redis.ResponseError)


def test_connection_sends_before_it_reads() -> None:
    """The journal sends a step's script and reads its reply after the next step, on a connection of its own.

    An error reply leaves the connection usable, and NOSCRIPT has its own exception. Open worker/jobs/redis_journal.py.
    """
    answers = {
        "SCRIPT": b"$3\r\nabc\r\n",
        "EVALSHA": b"*2\r\n*1\r\n$1\r\ne\r\n*1\r\n:2\r\n",
        "PING": b"-NOSCRIPT gone\r\n",
    }
    with RespServer(lambda command: answers[command[0]]) as server, connections.connect(server.url) as client:
        connection: Any = client.connection_pool.make_connection()
        connection.send_command("SCRIPT", "LOAD", "return 1")
        assert connection.read_response() == b"abc"
        packed = connection.pack_command("EVALSHA", "abc", 0, b"\x00", 1)
        connection.send_packed_command(packed, check_health=False)
        connection.send_command("PING")
        assert connection.read_response() == [[b"e"], [2]]
        with pytest.raises(NoScriptError):
            connection.read_response()
        connection.send_command("SCRIPT", "LOAD", "return 2")
        assert connection.read_response() == b"abc"
        connection.disconnect()
    assert server.commands[1] == ["EVALSHA", "abc", "0", "\x00", "1"]


def test_connection_comes_back_by_itself() -> None:
    """A lost journal connection reconnects with the next command. Open worker/jobs/redis_journal.py, `_reset`."""
    answers = iter([HANGS_UP, OK])
    with RespServer(lambda _: next(answers)) as server, connections.connect(server.url) as client:
        connection: Any = client.connection_pool.make_connection()
        connection.send_command("PING")
        with pytest.raises(redis.ConnectionError):
            connection.read_response()
        connection.disconnect()
        connection.send_command("PING")
        assert connection.read_response() == b"OK"
        connection.disconnect()
    assert len(server.commands) == 2


def test_pipelines_record() -> None:
    """A recorded pipeline has its commands in `command_stack`, as (arguments, options), and a length.

    The API reads them there; the heartbeat counts them. Open api/generation/job_queue.py, worker/jobs/heartbeat.py.
    """
    with redis.Redis() as client, client.pipeline() as pipe:
        pipe.hset("k", "f", 1)
        pipe.expire("k", 2)
        assert [arguments for arguments, _ in pipe.command_stack] == [
            ("HSET", "k", "f", 1),
            ("EXPIRE", "k", 2),
        ]
        assert len(pipe) == 2


def test_errors_in_place_of_answers() -> None:
    """`execute(raise_on_error=False)` returns each command's error in its position: a key of the wrong type does not affect other commands.

    Open api/generation/command_batch.py, worker/jobs/intake.py.
    """
    answers = {"GET": b"-WRONGTYPE not text\r\n", "RPUSH": b":1\r\n"}

    async def ask(url: str) -> list[Any]:
        client = connections.connect_async(url)
        try:
            async with client.pipeline(transaction=False) as pipe:
                for command in (("GET", "k"), ("RPUSH", "k", "v")):
                    pipe.execute_command(*command)
                answered: list[Any] = await pipe.execute(raise_on_error=False)
                return answered
        finally:
            await client.aclose()

    with RespServer(lambda command: answers[command[0]]) as server, connections.connect(server.url) as client:
        with client.pipeline(transaction=False) as pipe:
            pipe.get("k")
            pipe.rpush("k", "v")
            blocking = pipe.execute(raise_on_error=False)
        for error, number in (blocking, asyncio.run(ask(server.url))):
            assert isinstance(error, redis.ResponseError)
            assert "WRONGTYPE" in str(error)
            assert number == 1


def test_messages_of_a_subscription() -> None:
    """The relay distinguishes messages by `type`, and pings a silent channel. Open api/generation/events/relay.py, `_listen_on`."""
    answers = {
        "SUBSCRIBE": b">3\r\n$9\r\nsubscribe\r\n$1\r\nc\r\n:1\r\n>3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$2\r\nhi\r\n",
        "PING": b"+PONG\r\n",
    }

    async def listen(url: str) -> list[Any]:
        client = connections.connect_async(url)
        pubsub = client.pubsub()
        try:
            await pubsub.subscribe("c")
            received: list[Any] = [await pubsub.get_message(timeout=5) for _ in range(2)]
            received.append(await pubsub.get_message(timeout=0.01))
            await pubsub.ping()
            received.append(await pubsub.get_message(timeout=5))
            return received
        finally:
            await pubsub.aclose()
            await client.aclose()

    with RespServer(lambda command: answers[command[0]]) as server:
        subscribed, message, nothing, pong = asyncio.run(listen(server.url))
    assert subscribed["type"] == "subscribe"
    assert (message["type"], message["data"]) == ("message", b"hi")
    assert nothing is None
    assert pong["type"] == "pong"


def test_subscriptions_in_a_thread() -> None:
    """A worker's commands arrive through handlers on RQ's thread, and errors through `exception_handler(error, ...)`.

    Open worker/jobs/batch_worker.py, `subscribe`.
    """
    import threading

    answers = {
        "SUBSCRIBE": b">3\r\n$9\r\nsubscribe\r\n$1\r\nc\r\n:1\r\n>3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$2\r\nhi\r\n",
        "UNSUBSCRIBE": b">3\r\n$11\r\nunsubscribe\r\n$1\r\nc\r\n:0\r\n",
    }
    received: list[Any] = []
    failed = threading.Event()
    errors: list[BaseException] = []

    def handle(message: dict[str, Any]) -> None:
        received.append(message["data"])
        raise KeyError("bad message")

    def on_error(error: BaseException, *_: Any) -> None:
        errors.append(error)
        failed.set()

    with RespServer(lambda command: answers[command[0]]) as server, connections.connect(server.url) as client:
        pubsub = client.pubsub(ignore_subscribe_messages=True)
        pubsub.subscribe(c=handle)
        thread = pubsub.run_in_thread(sleep_time=0.05, daemon=True, exception_handler=on_error)
        assert failed.wait(5)
        assert thread.is_alive(), "an error that the handler accepts does not end the thread"
        thread.stop()
        thread.join(5)
    assert received == [b"hi"]
    assert isinstance(errors[0], KeyError)


def test_scripts_ask_first_in_a_pipeline() -> None:
    """A registered script in a pipeline costs an extra round trip (SCRIPT EXISTS), so intake sends EVAL. Open worker/jobs/intake.py."""
    answers = {"SCRIPT": b"*1\r\n:1\r\n", "EVALSHA": b":1\r\n"}
    with RespServer(lambda command: answers[command[0]]) as server, connections.connect(server.url) as client:
        script = client.register_script("return 1")
        with client.pipeline(transaction=False) as pipe:
            script(client=pipe)
            pipe.execute()
    assert server.commands[0][:2] == ["SCRIPT", "EXISTS"]
