"""The error for a Redis that does not answer, and timeouts."""

from __future__ import annotations

import pytest
import redis

from common import connections
from common.errors import StartupError
from common.settings import EMBEDDED_REDIS_URL


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        (EMBEDDED_REDIS_URL, r"no Redis answers at 127\.0\.0\.1:6399 \(gone\); `make up` starts one there"),
        ("redis://mac:6379/0", r"no Redis answers at mac:6379 \(gone\); start it, or set MLXPOOL_REDIS_URL"),
    ],
)
def test_no_answer_is_one_sentence(monkeypatch: pytest.MonkeyPatch, url: str, sentence: str) -> None:
    """For the default URL, the sentence mentions `make up`; for another, to start that server."""

    def ping(_client: redis.Redis) -> None:
        raise redis.ConnectionError("gone")

    monkeypatch.setattr(redis.Redis, "ping", ping)
    with connections.connect(url) as client, pytest.raises(StartupError, match=sentence):
        connections.check(client, -1)


def test_timeouts_are_shortened() -> None:
    """A client with a short timeout neither connects nor waits for a reply longer than that."""
    with connections.connect(EMBEDDED_REDIS_URL, 1) as client:
        options = client.connection_pool.connection_kwargs
        assert (options["socket_connect_timeout"], options["socket_timeout"]) == (1, 1)
    with connections.connect(EMBEDDED_REDIS_URL) as client:
        options = client.connection_pool.connection_kwargs
        assert options["socket_connect_timeout"] == connections.CONNECT_SECONDS
        assert options["socket_timeout"] == connections.ANSWER_SECONDS
