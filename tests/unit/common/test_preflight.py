"""What `make up` refuses before it starts anything: in which words, and how soon."""

from __future__ import annotations

import fcntl
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import StartupError
from common.pool import preflight, redis_server
from common.settings import Settings

SOON_SECONDS = 6
"""Redis gets two seconds; the rest is for a busy machine."""


def test_port_in_use() -> None:
    """A taken port is said before anything starts."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(StartupError, match=rf"listen on 127\.0\.0\.1:{port}: .*make up PORT=.*REDIS_URL"):
            preflight.check_port(Settings(port=port))
        with pytest.raises(StartupError, match=r"make up PORT=\d+$"):  # which has no embedded server
            preflight.check_port(Settings(port=port, redis_url="redis://other:6379/0"))
    preflight.check_port(Settings(port=port))


@pytest.mark.parametrize(
    ("host", "sentence"),
    [
        ("192.0.2.1", "is no address of this machine"),
        ("no such host", "MLXPOOL_HOST=no such host is no address"),
    ],
)
def test_host_that_is_none(host: str, sentence: str) -> None:
    """An address of another machine, or none at all, is named."""
    with pytest.raises(StartupError, match=sentence):
        preflight.check_port(Settings(host=host))


@pytest.fixture
def taken_port() -> Iterator[int]:
    """Somebody listens there, who says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_the_embedded_servers_port(taken_port: int, tmp_path: Path) -> None:
    """Another program on it is said at once, also where it answers nothing."""
    settings = Settings(redis_url=f"redis://127.0.0.1:{taken_port}/0", state_dir=str(tmp_path))
    began_at = time.monotonic()
    with pytest.raises(StartupError, match=f"port {taken_port}, which the embedded Redis needs, is taken"):
        redis_server.check(settings)
    assert time.monotonic() - began_at < SOON_SECONDS


def test_the_embedded_servers_lock(tmp_path: Path) -> None:
    """Another `make up` is one sentence."""
    folder = tmp_path / "redis-6399"
    folder.mkdir()
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StartupError, match="already running on port 6399, in another `make up`"):
            preflight.check_redis(Settings(state_dir=str(tmp_path)))


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("http://127.0.0.1:6379", "MLXPOOL_REDIS_URL is not a Redis URL"),
        ("redis://127.0.0.1:1/0", "no Redis answers at 127.0.0.1:1 .*start it, or set MLXPOOL_REDIS_URL"),
        ("unix:///no/such/socket", "no Redis answers at /no/such/socket"),
    ],
)
def test_a_redis_that_was_given(url: str, sentence: str) -> None:
    """One that is not there, or that is none, does not have the pool started."""
    began_at = time.monotonic()
    with pytest.raises(StartupError, match=sentence):
        preflight.check_redis(Settings(redis_url=url))
    assert time.monotonic() - began_at < SOON_SECONDS


def test_a_redis_that_says_nothing(taken_port: int) -> None:
    """A program that is no Redis is not waited for as one that is busy."""
    began_at = time.monotonic()
    with pytest.raises(StartupError, match=f"no Redis answers at 127.0.0.1:{taken_port}"):
        preflight.check_redis(Settings(redis_url=f"redis://127.0.0.1:{taken_port}/0"))
    assert time.monotonic() - began_at < SOON_SECONDS


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (Settings(host="0.0.0.0"), "^MLXPOOL_HOST=0.0.0.0 would let everybody"),  # noqa: S104 (refused)
        (Settings(api_keys_file="/no/such/keys"), "^the key file /no/such/keys does not exist"),
    ],
)
def test_what_the_api_refuses(settings: Settings, sentence: str) -> None:
    """Its own sentences, before it is started."""
    with pytest.raises(StartupError, match=sentence):
        preflight.check_api(settings)


def test_what_the_api_takes(tmp_path: Path) -> None:
    """Keys are leave enough to listen anywhere, and defaults need no look."""
    path = tmp_path / "keys"
    path.write_text("{}")
    preflight.check_api(Settings(host="0.0.0.0", api_keys_file=str(path)))  # noqa: S104 (not bound)
    preflight.check_api(Settings())


def test_models_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is not there, or holds no model, is said; the demo and a hub's repository are a worker's concern."""
    for name in ("check_port", "check_redis"):
        monkeypatch.setattr(preflight, name, lambda _: None)
    with pytest.raises(StartupError, match=r"folder /no/such does not exist; a model is a folder .* or demo"):
        preflight.check(Settings(), ["demo", "/no/such"])
    with pytest.raises(StartupError, match=r"there is no config.json in it"):
        preflight.check(Settings(), [str(tmp_path)])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "model.safetensors").touch()
    preflight.check(Settings(), ["demo", "org/repository", str(tmp_path)])
