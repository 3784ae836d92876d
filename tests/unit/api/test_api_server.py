"""How gunicorn is told to serve, and what may not be served."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from api.server import OPEN_FILES, options
from common.errors import StartupError
from common.settings import Settings


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com"])  # noqa: S104 (refused)
def test_nobody_else_is_served_by_accident(host: str) -> None:
    """Beyond loopback the API starts only where that is said to be meant."""
    with pytest.raises(StartupError, match="MLXPOOL_ALLOW_UNAUTHENTICATED"):
        options(Settings(host=host))
    options(Settings(host=host, allow_unauthenticated=True))


def test_with_keys_it_may_listen_anywhere(tmp_path: Path) -> None:
    """A file of keys, be it one of none, is as good as a leave; one that is not there or is garbled stops the start."""
    path = tmp_path / "keys"
    settings = Settings(host="0.0.0.0", api_keys_file=str(path))  # noqa: S104 (not bound)
    with pytest.raises(StartupError, match="does not exist"):
        options(settings)
    path.write_text("sk-mlxpool-swordfish")
    with pytest.raises(StartupError, match="no file of API keys") as caught:
        options(settings)
    assert "swordfish" not in str(caught.value)
    path.write_text("{}")
    assert options(settings)["bind"] == "0.0.0.0:8080"
    path.unlink()
    assert options(settings)["bind"] == "0.0.0.0:8080", "a reload goes by the keys read before"


@pytest.mark.parametrize(
    ("host", "bind"),
    [
        ("127.0.0.1", "127.0.0.1:8080"),
        ("127.1.2.3", "127.1.2.3:8080"),
        ("localhost", "localhost:8080"),
        ("::1", "[::1]:8080"),
    ],
)
def test_loopback_needs_no_leave(host: str, bind: str) -> None:
    """Each way to write loopback is fine, and IPv6 gets its brackets."""
    assert options(Settings(host=host))["bind"] == bind


def test_a_url_that_is_none_stops_the_start() -> None:
    """Before anything is forked, with a sentence."""
    with pytest.raises(StartupError, match="MLXPOOL_REDIS_URL"):
        options(Settings(redis_url="http://x"))


def test_settings_reach_gunicorn() -> None:
    """Processes, and a master that waits longer than its workers drain."""
    said = options(Settings(api_processes=3, drain_seconds=7))
    assert said["workers"] == 3
    assert said["graceful_timeout"] > 7
    assert said["control_socket_disable"] is True


def test_the_backlog_reaches_the_socket() -> None:
    """gunicorn's asgi worker forgets it: its loop's `create_server` gets it."""
    calls: list[dict[str, object]] = []
    changed: dict[str, object] = {}
    loop = SimpleNamespace(create_server=lambda **kwargs: calls.append(kwargs))
    worker = SimpleNamespace(loop=loop, cfg=SimpleNamespace(backlog=2048, set=changed.__setitem__))
    options(Settings(drain_seconds=7))["post_worker_init"](worker)
    loop.create_server(sock=None)
    assert calls == [{"sock": None, "backlog": 2048}]
    assert changed == {"graceful_timeout": 7}


@pytest.mark.parametrize("most", [300, None])
def test_a_shells_limit_of_open_files_is_raised(most: int | None) -> None:
    """A Mac's shell allows 256, each stream is one: the API takes as many as the system lets it have, and needs no more."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[1] if most is None else most
    script = (
        "import resource; from api.server import options; from common.settings import Settings;"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (256, {allowed}));"
        "options(Settings()); print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    wanted = OPEN_FILES if allowed == resource.RLIM_INFINITY else min(OPEN_FILES, allowed)
    assert done.stdout.split() == [str(wanted), str(allowed)]
