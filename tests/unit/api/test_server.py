"""gunicorn's options, and settings with which the API refuses to start."""

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
def test_beyond_loopback_without_keys(host: str) -> None:
    """The API starts only if the setting allows it."""
    with pytest.raises(StartupError, match="MLXPOOL_ALLOW_UNAUTHENTICATED"):
        options(Settings(host=host))
    options(Settings(host=host, allow_unauthenticated=True))


def test_beyond_loopback_with_keys(tmp_path: Path) -> None:
    """A key file, also an empty one, is enough; a missing or malformed one prevents the start."""
    path = tmp_path / "keys"
    settings = Settings(host="0.0.0.0", api_keys_file=str(path))  # noqa: S104 (not bound)
    with pytest.raises(StartupError, match="does not exist"):
        options(settings)
    path.write_text("sk-mlxpool-swordfish")
    with pytest.raises(StartupError, match="not a file of API keys") as caught:
        options(settings)
    assert "swordfish" not in str(caught.value)
    path.write_text("{}")
    assert options(settings)["bind"] == "0.0.0.0:8080"
    path.unlink()
    assert options(settings)["bind"] == "0.0.0.0:8080", "a reload uses the keys that were read before"


@pytest.mark.parametrize(
    ("host", "bind"),
    [
        ("127.0.0.1", "127.0.0.1:8080"),
        ("127.1.2.3", "127.1.2.3:8080"),
        ("localhost", "localhost:8080"),
        ("::1", "[::1]:8080"),
    ],
)
def test_loopback_needs_no_keys(host: str, bind: str) -> None:
    """Every loopback address is accepted, and IPv6 is put in brackets."""
    assert options(Settings(host=host))["bind"] == bind


def test_a_malformed_redis_url() -> None:
    """It prevents the start before any process is forked."""
    with pytest.raises(StartupError, match="MLXPOOL_REDIS_URL"):
        options(Settings(redis_url="http://x"))


def test_a_malformed_origin() -> None:
    """It prevents the start before any process is forked, with or without keys."""
    with pytest.raises(StartupError, match="MLXPOOL_CORS_ORIGINS"):
        options(Settings(cors_origins="app.example"))


def test_settings_reach_gunicorn() -> None:
    """The number of processes, and a master that waits longer than its workers drain."""
    given = options(Settings(api_processes=3, drain_seconds=7))
    assert given["workers"] == 3
    assert given["graceful_timeout"] > 7
    assert given["control_socket_disable"] is True


def test_the_backlog_reaches_the_socket() -> None:
    """gunicorn's asgi worker does not pass it on, so the loop's `create_server` is given it."""
    calls: list[dict[str, object]] = []
    changed: dict[str, object] = {}
    loop = SimpleNamespace(create_server=lambda **kwargs: calls.append(kwargs))
    worker = SimpleNamespace(loop=loop, cfg=SimpleNamespace(backlog=2048, set=changed.__setitem__))
    options(Settings(drain_seconds=7))["post_worker_init"](worker)
    loop.create_server(sock=None)
    assert calls == [{"sock": None, "backlog": 2048}]
    assert changed == {"graceful_timeout": 7}


@pytest.mark.parametrize("hard", [300, None])
def test_the_limit_of_open_files_is_raised(hard: int | None) -> None:
    """From 256, as in a Mac's shell, to what is needed or the hard limit; a hard limit below that is no error."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[1] if hard is None else hard
    script = (
        "import resource; from api.server import options; from common.settings import Settings;"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (256, {allowed}));"
        "options(Settings()); print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    wanted = OPEN_FILES if allowed == resource.RLIM_INFINITY else min(OPEN_FILES, allowed)
    assert done.stdout.split() == [str(wanted), str(allowed)]


def test_malformed_aliases() -> None:
    """The API does not start with aliases that it cannot read."""
    with pytest.raises(StartupError, match="MLXPOOL_MODEL_ALIASES"):
        options(Settings(model_aliases="claude"))
