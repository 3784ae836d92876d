"""What can be known before `make up` starts anything: each is one sentence at once, and not a pool that ends again.

The checks are the processes' own, and each process still makes them. The API's are run as a command: it is not imported.
"""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from common import connections, local_model
from common.errors import StartupError
from common.pool import redis_server
from common.settings import DEMO_MODEL, EMBEDDED_REDIS_URL, PREFIX, Settings

ROOT = Path(__file__).resolve().parent.parent.parent

REDIS_PATIENCE_SECONDS = 2.0
"""A Redis of one's own is running already, or is just starting in the same script."""


def check(settings: Settings, models: Iterable[str]) -> None:
    """Make sure of what can be made sure of.

    Raises:
        StartupError: The pool would not come up.
    """
    check_api(settings)
    check_port(settings)
    for model in models:
        if model != DEMO_MODEL:
            local_model.given(model)
    check_redis(settings)


def check_api(settings: Settings) -> None:
    """Let the API look at where it listens and at its key file, unless both are the defaults, which take no time to check.

    Raises:
        StartupError: It would not start.
    """
    if (settings.host, settings.api_keys_file) == (Settings().host, None):
        return
    command = [sys.executable, "-m", "api.server"]
    env = {**os.environ, **settings.to_environ()}
    checked = subprocess.run(command, env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
    if checked.returncode != 0:
        lines = checked.stderr.strip().splitlines() or ["the API cannot start"]
        raise StartupError(lines[-1].removeprefix("mlx-pool: "))


def check_port(settings: Settings) -> None:
    """Make sure that the API can listen.

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
        raise StartupError(f"{PREFIX}HOST={settings.host} is no address ({error.strerror})") from None
    except OSError as error:
        where = f"the API cannot listen on {settings.host}:{settings.port}"
        if error.errno == errno.EADDRNOTAVAIL:
            raise StartupError(
                f"{where}: {PREFIX}HOST is no address of this machine; 0.0.0.0 is all that it has"
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
            f"{where}: the port is in use; end what listens there, or take another: make up PORT={settings.port % 65535 + 1}"
            + second
        ) from None


def check_redis(settings: Settings) -> None:
    """Make sure that the embedded Redis can start, or that the one that was given answers.

    Raises:
        StartupError: Not so.
    """
    if settings.redis_url == EMBEDDED_REDIS_URL:
        redis_server.check(settings)
        return
    with connections.connect(settings.redis_url, REDIS_PATIENCE_SECONDS) as client:
        connections.check(client, REDIS_PATIENCE_SECONDS)
