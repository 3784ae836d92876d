"""`make up`: which processes it starts, with which settings, and what it prints."""

from __future__ import annotations

import json
import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from honcho.printer import Message

from common.errors import StartupError
from common.pool import preflight, up
from common.settings import Settings


class Recorder:
    """Records what honcho's manager would start."""

    def __init__(self) -> None:
        self.processes: dict[str, dict[str, Any]] = {}

    def add_process(self, name: str, cmd: str, env: dict[str, str], cwd: str) -> None:
        self.processes[name] = {"cmd": cmd, "env": env, "cwd": cwd}


def _processes(settings: Settings, num_each: int = 1, **environ: str) -> dict[str, dict[str, Any]]:
    recorder = Recorder()
    up.add_processes(recorder, up.worker_settings(settings), num_each, environ)
    return recorder.processes


def test_one_of_each() -> None:
    """By default: the embedded server, the API and one worker, as the Procfile says."""
    processes = _processes(Settings())
    assert list(processes) == ["redis", "api", "worker"]
    assert processes["worker"]["cmd"].endswith("python -m worker")
    assert processes["worker"]["env"]["MLXPOOL_MODEL"] == "demo"


def test_own_redis() -> None:
    """With MLXPOOL_REDIS_URL, no server is started."""
    assert list(_processes(Settings(redis_url="redis://other:6379/0"))) == ["api", "worker"]


def test_workers_of_several_models() -> None:
    """MODEL is a list, and WORKERS the number of workers for each model."""
    processes = _processes(Settings(model="demo '/models/with space'"), 2)
    models = [process["env"]["MLXPOOL_MODEL"] for name, process in processes.items() if "worker" in name]
    assert models == ["demo", "demo", "/models/with space", "/models/with space"]


def test_the_pool_does_not_drain() -> None:
    """The API ends with the workers, so these do not drain, unless DRAIN_SECONDS is set."""
    assert _processes(Settings())["worker"]["env"]["MLXPOOL_DRAIN_SECONDS"] == "1.0"
    processes = _processes(Settings(), MLXPOOL_DRAIN_SECONDS="9")
    assert processes["worker"]["env"]["MLXPOOL_DRAIN_SECONDS"] == "9"


@pytest.mark.parametrize("model", ["demo demo", "/a/b /c/b", "'demo", " "])
def test_unusable_lists_of_models(model: str) -> None:
    """Two models with one id, an unclosed quote and an empty list are refused in one sentence."""
    with pytest.raises(StartupError):
        up.worker_settings(Settings(model=model))


def _stopped(**statuses: int) -> up.Pool:
    """A pool whose processes have exited in order, after a sentence each."""
    pool = up.Pool(Settings(), ["demo"])
    for name in statuses:
        pool.add_process(name, "true")
        for line in (
            b"mlx-pool worker: old news",
            f"mlx-pool {name}: {name} is why",
            b"and a line behind it",
        ):
            pool.events.put(Message("line", line, datetime.now(UTC), name, None))
        pool.events.put(Message("start", {"pid": 0}, datetime.now(UTC), name, None))
    for name, status in statuses.items():
        pool.events.put(Message("stop", {"returncode": status}, datetime.now(UTC), name, None))
    return pool


@pytest.mark.parametrize(
    ("statuses", "reason"),
    [
        ({"redis": 0, "worker": 1}, None),
        ({"api": 1, "worker": 0}, "api is why"),
        ({"redis": 1, "worker": 1}, "redis is why"),
        ({"worker": 130}, None),
    ],
)
def test_the_error_of_the_failed_process_is_repeated(
    statuses: dict[str, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sentence of the process that could not start is the error, whatever was printed after it."""
    pool = _stopped(**statuses)
    monkeypatch.setattr(pool, "_start", lambda: None)
    monkeypatch.setattr(pool, "_killall", lambda **_: None)
    pool.loop()
    assert pool.error() == reason


def test_ready_when_every_api_process_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """If one API process is not up yet, the pool is not ready."""
    answers = iter([True] * 7 + [False])
    monkeypatch.setattr(up, "_is_one_ready", lambda *_: next(answers))
    assert not up.is_ready(Settings(api_processes=2), ["demo"])
    monkeypatch.setattr(up, "_is_one_ready", lambda *_: True)
    assert up.is_ready(Settings(api_processes=2), ["demo"])


def test_banner_can_be_pasted() -> None:
    """The curl line can be parsed by a shell, and names a model that is served."""
    text = up.banner(Settings(port=9000), ["it's", "b"])
    (line,) = [line for line in text.splitlines() if "curl -N" in line]
    words = shlex.split(line)
    assert words[2] == "http://127.0.0.1:9000/v1/chat/completions"
    assert json.loads(words[-1])["model"] == "it's"
    assert "rq info --url redis://127.0.0.1:6399/0" in text


def test_banner_with_keys() -> None:
    """If a key is needed, the curl line has a placeholder for it."""
    assert "-H 'Authorization: Bearer YOUR_KEY'" in up.banner(Settings(api_keys_file="keys"), ["demo"])
    assert "Authorization" not in up.banner(Settings(), ["demo"])


@pytest.mark.parametrize("url", ["redis://:secret@mac:6379/0", "redis://mac:6379/0?password=secret"])
def test_banner_hides_the_password(url: str) -> None:
    """A URL that may contain a password is not shown; the banner explains how to use the line."""
    text = up.banner(Settings(redis_url=url, host="0.0.0.0"), ["demo"])  # noqa: S104
    assert "secret" not in text
    assert 'rq info --url "$MLXPOOL_REDIS_URL"\n' in text
    assert "export MLXPOOL_REDIS_URL" in text
    assert "http://127.0.0.1:8080/v1" in text


def test_banner_shows_a_url_without_a_password() -> None:
    """It may have been a variable of make, which is not set in the next shell."""
    text = up.banner(Settings(redis_url="redis://mac:6379/0"), ["demo"])
    assert "rq info --url redis://mac:6379/0\n" in text
    assert "export" not in text


def test_not_ready_before_the_api_listens() -> None:
    """A refused connection means that the pool is not ready; it is not an error."""
    assert not up.is_ready(Settings(port=1), ["demo"])


def test_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bad setting is refused in one sentence, with status 1."""
    monkeypatch.setenv("MLXPOOL_PROT", "9000")
    monkeypatch.setattr("sys.argv", ["up"])
    assert up.main() == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("workers", ["0", "-1", "two", "", "1.5"])
def test_bad_number_of_workers(workers: str) -> None:
    """Refused in one sentence, without the usage of a command that make ran."""
    with pytest.raises(StartupError, match="WORKERS must be a whole number of at least 1"):
        up.run([f"--workers={workers}"])


def test_the_same_model_twice() -> None:
    """The sentence explains how to start two workers of one model."""
    with pytest.raises(StartupError, match="both have the id demo; for two workers of one model: WORKERS=2"):
        up.worker_settings(Settings(model="demo demo"))
    with pytest.raises(StartupError, match=r"both have the id b$"):
        up.worker_settings(Settings(model="/a/b /c/b"))


@pytest.mark.parametrize(("status", "expected"), [(130, 0), (143, 143), (1, 1)])
def test_status_after_ctrl_c(monkeypatch: pytest.MonkeyPatch, status: int, expected: int) -> None:
    """After Ctrl-C the status is 0: make reports no error."""
    monkeypatch.setattr(up, "run", lambda: status)
    assert up.main() == expected


def test_procfile_is_found_from_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The processes run in the repository, whatever the working directory."""
    monkeypatch.chdir(tmp_path)
    assert _processes(Settings())["api"]["cwd"] == str(preflight.ROOT)
