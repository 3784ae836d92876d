"""What `make up` refuses before it starts anything: the sentences, and how quickly."""

from __future__ import annotations

import fcntl
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from common.errors import StartupError
from common.machine import memory_claims
from common.machine.memory_claims import Claim, Machine
from common.pool import preflight, redis_server
from common.settings import Settings

SOON_SECONDS = 6
"""Two seconds are for Redis; the rest is for a busy machine."""


def test_port_in_use() -> None:
    """A port in use is reported before anything starts."""
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
        ("192.0.2.1", "is not an address of this machine"),
        ("no such host", "MLXPOOL_HOST=no such host is not an address"),
    ],
)
def test_bad_host(host: str, sentence: str) -> None:
    """An address of another machine, or text that is no address, is named."""
    with pytest.raises(StartupError, match=sentence):
        preflight.check_port(Settings(host=host))


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port on which another program listens, without ever answering."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_port_of_the_embedded_server(taken_port: int, tmp_path: Path) -> None:
    """Another program on it is reported at once, even if it does not answer."""
    settings = Settings(redis_url=f"redis://127.0.0.1:{taken_port}/0", state_dir=str(tmp_path))
    began_at = time.monotonic()
    with pytest.raises(StartupError, match=f"port {taken_port}, which the embedded Redis needs, is taken"):
        redis_server.check(settings)
    assert time.monotonic() - began_at < SOON_SECONDS


def test_lock_of_the_embedded_server(tmp_path: Path) -> None:
    """Another running `make up` is reported in one sentence."""
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
def test_unreachable_redis(url: str, sentence: str) -> None:
    """If no Redis answers at the given URL, the pool is not started."""
    began_at = time.monotonic()
    with pytest.raises(StartupError, match=sentence):
        preflight.check_redis(Settings(redis_url=url))
    assert time.monotonic() - began_at < SOON_SECONDS


def test_redis_that_does_not_answer(taken_port: int) -> None:
    """A program that accepts connections but is not Redis is given up quickly."""
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
def test_errors_of_the_api(settings: Settings, sentence: str) -> None:
    """The API's own sentences, before it is started."""
    with pytest.raises(StartupError, match=sentence):
        preflight.check_api(settings)


def test_accepted_by_the_api(tmp_path: Path) -> None:
    """With API keys, any address is accepted; the defaults need no check."""
    path = tmp_path / "keys"
    path.write_text("{}")
    preflight.check_api(Settings(host="0.0.0.0", api_keys_file=str(path)))  # noqa: S104 (not bound)
    preflight.check_api(Settings())


def workers(*models: str, **settings: Any) -> list[Settings]:
    """The settings of a worker for each model."""
    return [Settings(model=model, **settings) for model in models]


def model_folder(path: Path, num_gb: float) -> str:
    """A folder that looks like a model's, with weights of this size in a file that takes no room on the disk."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with (path / "model.safetensors").open("wb") as weights:
        weights.truncate(int(num_gb * memory_claims.GB))
    return str(path)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with 12 GB for workers."""
    line = msgspec.json.encode(Machine("gpu 0", 12 * memory_claims.GB)).decode()
    monkeypatch.setattr(preflight, "_output", lambda *_: line)


@pytest.mark.usefixtures("machine")
def test_workers_that_do_not_fit_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """How much each model needs, how often, and how much there is; a limit that was set is only warned of."""
    models = model_folder(tmp_path / "a", 2.0), model_folder(tmp_path / "b", 4.0)
    state = str(tmp_path / "state")
    preflight.check_memory(workers(*models, state_dir=state), 1)
    with pytest.raises(
        StartupError, match=r"2 × \S+/a 2\.3 GB \+ 2 × \S+/b 4\.3 GB = 13\.2 GB.* may use 12\.0 GB"
    ):
        preflight.check_memory(workers(*models, state_dir=state), 2)
    preflight.check_memory(workers(*models, state_dir=state, memory_limit_gb=3.0), 2)
    assert not capsys.readouterr().err
    preflight.check_memory(workers(*models, state_dir=state, memory_limit_gb=4.0), 2)
    assert "warning: memory may run short" in capsys.readouterr().err


@pytest.mark.usefixtures("machine")
def test_workers_that_run_already_count(tmp_path: Path) -> None:
    """Two models that would fit alone do not fit next to a third one's worker."""
    models = model_folder(tmp_path / "a", 2.0), model_folder(tmp_path / "b", 4.0)
    running = memory_claims.register(
        Claim(1, "c", "gpu 0", 6 * memory_claims.GB),
        Machine("gpu 0", 12 * memory_claims.GB),
        memory_claims.folder(tmp_path / "state"),
    )
    with pytest.raises(StartupError, match=r"next to the 1 that already run here: c 6\.4 GB \+"):
        preflight.check_memory(workers(*models, state_dir=str(tmp_path / "state")), 1)
    running.close()
    preflight.check_memory(workers(*models, state_dir=str(tmp_path / "state")), 1)


def test_mlx_says_how_much_memory_there_is(tmp_path: Path) -> None:
    """No machine has so much memory: the real command's answer is what the models are compared with."""
    huge = model_folder(tmp_path / "huge", 7_000.0), model_folder(tmp_path / "huge too", 7_000.0)
    with pytest.raises(
        StartupError, match="GB of this machine's memory; start fewer, or take smaller models"
    ):
        preflight.check_memory(workers(*huge, state_dir=str(tmp_path)), 1)


def test_model_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing folder, or one without a model, is reported; the demo and hub repositories are left to the worker."""
    for name in ("check_port", "check_redis", "check_memory"):
        monkeypatch.setattr(preflight, name, lambda *_: None)
    with pytest.raises(StartupError, match=r"folder /no/such does not exist; a model is a folder .* or demo"):
        preflight.check(Settings(), workers("demo", "/no/such"))
    with pytest.raises(StartupError, match=r"there is no config.json in it"):
        preflight.check(Settings(), workers(str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "model.safetensors").touch()
    preflight.check(Settings(), workers("demo", "org/repository", str(tmp_path)))
