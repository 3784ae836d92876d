"""The checks that `make up` makes before it starts anything: a pool that cannot start is refused in one sentence.

Each process still makes its own checks. Those of the API and of MLX run as commands, since `common` imports neither.
"""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from common import connections
from common.errors import StartupError
from common.machine import local_model, memory_claims
from common.machine.folders import state_folder
from common.machine.memory_claims import GB, Claim, Machine
from common.pool import redis_server
from common.settings import DEMO_MODEL, EMBEDDED_REDIS_URL, PREFIX, Settings

ROOT = Path(__file__).resolve().parent.parent.parent

REDIS_PATIENCE_SECONDS = 2.0
"""How long a Redis of the user's own may take to answer: the same script may have just started it."""

_DEMO_BYTES = 540 * 10**6
"""Of the demo model's weights in float32."""


def check(settings: Settings, workers: Sequence[Settings], num_each: int = 1) -> None:
    """Check what can be known before anything starts.

    Args:
        workers: The settings of the workers, one for each model.
        num_each: Workers of each model.

    Raises:
        StartupError: The pool would not start.
    """
    check_api(settings)
    check_port(settings)
    for worker in workers:
        if worker.model != DEMO_MODEL:
            local_model.find_folder(worker.model)
    check_memory(workers, num_each)
    check_redis(settings)


def check_api(settings: Settings) -> None:
    """Let the API check its address and key file, unless both are the defaults, which are always fine.

    Raises:
        StartupError: It would not start.
    """
    if (settings.host, settings.api_keys_file) != (Settings().host, None):
        _output("api.server", settings)


def check_port(settings: Settings) -> None:
    """Check that the API can listen.

    Raises:
        StartupError: It cannot.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror as error:
        raise StartupError(f"{PREFIX}HOST={settings.host} is not an address ({error.strerror})") from None
    except OSError as error:
        where = f"the API cannot listen on {settings.host}:{settings.port}"
        if error.errno == errno.EADDRNOTAVAIL:
            raise StartupError(
                f"{where}: {PREFIX}HOST is not an address of this machine; 0.0.0.0 stands for all of its addresses"
            ) from None
        if error.errno != errno.EADDRINUSE:
            raise StartupError(f"{where} ({error.strerror})") from None
        second = (
            ""
            if settings.redis_url != EMBEDDED_REDIS_URL
            else " (a second pool on this machine also needs a Redis of its own, which you start:"
            " make up REDIS_URL=redis://127.0.0.1:6380/0)"
        )
        raise StartupError(
            f"{where}: the port is in use; stop the program that listens there, or use another port:"
            f" make up PORT={settings.port % 65535 + 1}{second}"
        ) from None


def check_memory(workers: Sequence[Settings], num_each: int) -> None:
    """Check that the models fit in memory together, next to the workers that already run on this machine.

    One worker alone is not checked here: MLX may need less than its files have. Neither is a model that is still to be
    downloaded: its worker checks it before it loads it.

    Raises:
        StartupError: They do not fit; says how much each needs.
    """
    if len(workers) * num_each == 1:
        return
    machine = msgspec.json.decode(_output("worker.mlx.memory.memory_share", workers[0]), type=Machine)
    limit_gb = workers[0].memory_limit_gb
    limit_bytes = None if limit_gb is None else int(limit_gb * GB)
    claims = [
        Claim(os.getpid(), worker.model, machine.device, _weight_bytes(worker.model), limit_bytes)
        for worker in workers
        for _ in range(num_each)
    ]
    running = memory_claims.read(memory_claims.folder(state_folder(workers[0])), machine.device)
    complaint = memory_claims.misfit([*running, *claims], machine)
    if complaint is None:
        return
    if limit_bytes is not None:
        sys.stderr.write(f"mlx-pool: warning: memory may run short: {complaint}\n")
        return
    others = f" next to the {len(running)} that already run here" if running else ""
    raise StartupError(
        f"these workers do not fit in memory{others}: {complaint}; start fewer, or take smaller models"
    )


def _weight_bytes(model: str) -> int:
    """The size of a model's weights on this disk; 0 if they are still to be downloaded."""
    if model == DEMO_MODEL:
        return _DEMO_BYTES
    folder = local_model.find_folder(model)
    if folder is None:
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(model, "config.json")
        if not isinstance(config, str):
            return 0
        folder = Path(config).parent
    return memory_claims.weight_bytes(folder)


def _output(module: str, settings: Settings) -> str:
    """What `python -m module` writes to standard output.

    Raises:
        StartupError: It failed; with its last line.
    """
    env = {**os.environ, **settings.to_environ()}
    ran = subprocess.run(
        [sys.executable, "-m", module], env=env, cwd=ROOT, capture_output=True, text=True, check=False
    )
    if ran.returncode != 0:
        lines = ran.stderr.strip().splitlines() or [f"python -m {module} failed"]
        raise StartupError(lines[-1].removeprefix("mlx-pool: "))
    return ran.stdout


def check_redis(settings: Settings) -> None:
    """Check that the embedded Redis can start, or that the given one answers.

    Raises:
        StartupError: It cannot, or does not.
    """
    if settings.redis_url == EMBEDDED_REDIS_URL:
        redis_server.check(settings)
        return
    with connections.connect(settings.redis_url, REDIS_PATIENCE_SECONDS) as client:
        connections.check(client, REDIS_PATIENCE_SECONDS)
