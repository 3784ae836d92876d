"""Connections to Redis, for all processes: timeouts, keep-alive, and the sentence for a server that does not answer."""

from __future__ import annotations

import time
from typing import Any

import redis
import redis.asyncio
import redis.asyncio.retry
from redis.backoff import NoBackoff
from redis.retry import Retry

from common.errors import StartupError
from common.settings import EMBEDDED_REDIS_URL

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 15.0
"""Longer than any of our blocking commands (1 s), and than a slow save on a busy disk."""

START_SECONDS = 5.0
"""How long a starting process waits for a server that starts at the same time, as under `make up`."""

START_POLL_SECONDS = 0.1

_EXAMPLE = "redis://:PASSWORD@HOST:6379/0"


# NOTE: retry=0. redis-py 8 repeats a command by itself after a dropped connection, also one that the server has already
# executed: a MULTI that enqueues would run twice. The code that sends a command decides whether it may be repeated.
def _options(url: str, answer_seconds: float = ANSWER_SECONDS) -> dict[str, Any]:
    connect_seconds = min(CONNECT_SECONDS, answer_seconds)
    options: dict[str, Any] = {"socket_connect_timeout": connect_seconds, "socket_timeout": answer_seconds}
    if not url.startswith("unix:"):  # whose connections have no such option (redis-py 8.1)
        options["socket_keepalive"] = True
    return options


def connect(url: str, answer_seconds: float = ANSWER_SECONDS) -> redis.Redis:
    """A blocking client; it connects at its first command.

    Raises:
        StartupError: The URL is not a Redis URL.
    """
    try:
        return redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0), **_options(url, answer_seconds))
    except ValueError as error:
        raise _bad_url(error) from None


def connect_async(url: str) -> redis.asyncio.Redis:
    """An asyncio client; it connects at its first command.

    Raises:
        StartupError: The URL is not a Redis URL.
    """
    try:
        return redis.asyncio.Redis.from_url(
            url, retry=redis.asyncio.retry.Retry(NoBackoff(), 0), **_options(url)
        )
    except ValueError as error:
        raise _bad_url(error) from None


def _bad_url(error: ValueError) -> StartupError:
    return StartupError(f"MLXPOOL_REDIS_URL is not a Redis URL ({error}); an example is {_EXAMPLE}")


def refusal(client: redis.Redis | redis.asyncio.Redis, error: redis.AuthenticationError) -> str:
    """The sentence for a Redis that refuses our credentials."""
    if client.connection_pool.connection_kwargs.get("password") is None:
        return f"Redis at {_where(client)} requires a password in MLXPOOL_REDIS_URL: {_EXAMPLE}"
    return f"Redis at {_where(client)} refuses the password in MLXPOOL_REDIS_URL ({error}); set the right one: {_EXAMPLE}"


def _where(client: redis.Redis | redis.asyncio.Redis) -> str:
    options = client.connection_pool.connection_kwargs
    return str(options.get("path") or f"{options.get('host')}:{options.get('port')}")


def _start(client: redis.Redis) -> str:
    """What to do if no Redis answers."""
    if f"redis://{_where(client)}/0" == EMBEDDED_REDIS_URL:
        return "`make up` starts one there; or set MLXPOOL_REDIS_URL to your own"
    return "start it, or set MLXPOOL_REDIS_URL to another one"


def check(client: redis.Redis, patience_seconds: float = START_SECONDS) -> None:
    """Wait until the server answers, at most `patience_seconds`: it may be starting at the same time.

    Raises:
        StartupError: It does not, or it refuses us.
    """
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            client.ping()
        except redis.AuthenticationError as error:
            raise StartupError(refusal(client, error)) from None
        except redis.RedisError as error:
            if time.monotonic() > deadline:
                raise StartupError(
                    f"no Redis answers at {_where(client)} ({error}); {_start(client)}"
                ) from None
            time.sleep(START_POLL_SECONDS)
        else:
            return
