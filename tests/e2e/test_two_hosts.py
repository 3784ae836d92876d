"""Two machines: a worker on another host needs only the address of a Redis with a password, and a model."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common import connections
from tests.conftest import missing
from tests.redis.pool_of_workers import Workers, exact, wait_until

ROOT = Path(__file__).resolve().parent.parent.parent
HOSTS = {"first": "10.231.77.1", "second": "10.231.77.2"}


class Host:
    """A network namespace with one address, connected to the other host."""

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address

    def command(self, *words: str) -> list[str]:
        return ["ip", "netns", "exec", self.name, *words]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts, removed after the test."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        missing("network namespaces (Linux, root and iproute2)")
    tag = secrets.token_hex(3)
    first, second = (Host(f"mlxpool-{tag}-{name}", address) for name, address in HOSTS.items())
    try:
        for host in (first, second):
            ip("netns", "add", host.name)
        ip(
            "link",
            "add",
            f"a{tag}",
            "netns",
            first.name,
            "type",
            "veth",
            "peer",
            "name",
            f"b{tag}",
            "netns",
            second.name,
        )
        for host, cable in ((first, f"a{tag}"), (second, f"b{tag}")):
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", cable)
            ip("-n", host.name, "link", "set", cable, "up")
            ip("-n", host.name, "link", "set", "lo", "up")
        yield first, second
    finally:
        for host in (first, second):
            subprocess.run(["ip", "netns", "del", host.name], check=False, capture_output=True)


def test_a_worker_on_another_host(hosts: tuple[Host, Host], server_binary: str, tmp_path: Path) -> None:
    """A request to the first host is served by the worker on the second; without the password, the worker reports one sentence."""
    first, second = hosts
    socket = tmp_path / "redis.sock"  # how this test, which is on neither host, reaches the first one's Redis
    options = [
        "--bind",
        first.address,
        "--port",
        "6379",
        "--requirepass",
        "hunter2",
        "--save",
        "",
        "--dir",
        str(tmp_path),
    ]
    server = subprocess.Popen(
        first.command(server_binary, *options, "--unixsocket", str(socket)), stdout=subprocess.DEVNULL
    )
    environ = {k: v for k, v in os.environ.items() if not k.startswith("MLXPOOL_")}
    command = second.command(sys.executable, "-m", "bench.harness.synthetic_worker", "--name", "m")
    worker = None
    try:
        wait_until(socket.exists)
        url = f"redis://:%s@{first.address}:6379/0"
        refused = subprocess.run(
            command,
            cwd=ROOT,
            env=environ | {"MLXPOOL_REDIS_URL": url % "wrong"},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert refused.returncode == 1
        assert "refuses the password" in refused.stderr
        assert "Traceback" not in refused.stderr
        worker = subprocess.Popen(command, cwd=ROOT, env=environ | {"MLXPOOL_REDIS_URL": url % "hunter2"})
        with Workers(f"unix://:hunter2@{socket}") as workers:
            wait_until(workers.cards)
            job = workers.submit()
            wait_until(lambda: workers.has_ended(job))
            assert workers.text(job) == exact(20)
        with connections.connect(f"unix://:hunter2@{socket}") as client:
            addresses = {each["addr"].rsplit(":", 1)[0] for each in client.client_list()}
        assert second.address in addresses
    finally:
        for process in (worker, server):
            if process is not None:
                process.terminate()
                process.wait(10)
