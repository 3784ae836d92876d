"""How gunicorn serves the API, made from our settings; and what may not be served at all.

Read by `api/gunicorn.conf.py`, before anything is forked.
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import logging
import resource
import sys
from pathlib import Path
from typing import Any

from gunicorn.glogging import Logger  # type: ignore[import-untyped]

from api.auth import key_file
from api.http import connection as gunicorn_protocol
from api.http.headers import for_any_origin
from common import connections, garbage
from common import logging as common_logging
from common.errors import StartupError
from common.settings import PREFIX, Settings

KEEP_ALIVE_SECONDS = 15
"""Longer than the clients of Python keep an idle connection (5 s): who closes first never cuts off a request."""

BACKLOG = 2048
MAX_LINE_BYTES = 8190
MAX_HEADERS = 100
MAX_HEADER_BYTES = 16 * 1024
KILL_SECONDS = 5

OPEN_FILES = 10_240
"""The most that each macOS takes (OPEN_MAX): a connection each, and a few of our own."""


def options(settings: Settings) -> dict[str, Any]:
    """gunicorn's settings.

    Raises:
        StartupError: The API may not listen there, its key file cannot be read, or the settings name no Redis.
    """
    check_host(settings)
    allow_open_files()
    if settings.api_keys_file is not None:
        key_file.opened(
            Path(settings.api_keys_file).expanduser()
        )  # for all processes that are forked from here
    connections.connect(settings.redis_url).close()  # connects to nothing: it only reads the URL

    def post_fork(_arbiter: Any, _worker: Any) -> None:
        common_logging.configure(settings.log_level)
        for handler in logging.getLogger("gunicorn.error").handlers:
            handler.setFormatter(common_logging.Formatter(Logger.error_fmt, Logger.datefmt))

    def post_worker_init(worker: Any) -> None:
        # gunicorn 27's asgi worker listens anew and leaves out its backlog: asyncio's 100 then makes a burst beyond it
        # wait a second, until its SYNs are sent again.
        worker.loop.create_server = functools.partial(worker.loop.create_server, backlog=worker.cfg.backlog)
        # The master kills what is left after its own graceful_timeout: a worker's has to be over before, so that it can
        # cancel what still runs.
        worker.cfg.set("graceful_timeout", int(settings.drain_seconds))

        gunicorn_protocol.install(
            settings.header_seconds, settings.take_seconds, for_any_origin(settings.cors_origins)
        )
        garbage.spare_what_is_loaded()

    def worker_int(worker: Any) -> None:
        # On SIGINT gunicorn leaves out the lifespan's end. Nothing is waited for then, but what runs is cancelled.
        worker.cfg.set("graceful_timeout", 0)
        worker._quick_shutdown = False  # noqa: SLF001 (gunicorn 27)

    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return {
        "bind": f"{host}:{settings.port}",
        "workers": settings.api_processes,
        "worker_class": "asgi",
        "asgi_loop": "asyncio",
        "asgi_lifespan": "on",
        "backlog": BACKLOG,
        "keepalive": KEEP_ALIVE_SECONDS,
        "graceful_timeout": int(settings.drain_seconds) + KILL_SECONDS,
        "limit_request_line": MAX_LINE_BYTES,
        "limit_request_fields": MAX_HEADERS,
        "limit_request_field_size": MAX_HEADER_BYTES,
        "control_socket_disable": True,  # gunicorn 27 writes one into the home folder
        "accesslog": None,  # our own line a request says more
        "loglevel": settings.log_level.lower(),
        "proc_name": "mlx-pool-api",
        "post_fork": post_fork,
        "post_worker_init": post_worker_init,
        "worker_int": worker_int,
    }


def allow_open_files() -> None:
    """Have room for as many connections as the system lets this process and its children have: a Mac's shell starts with 256."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if most == resource.RLIM_INFINITY else min(OPEN_FILES, most)
    if now == resource.RLIM_INFINITY or now >= wanted:
        return
    # What macOS's kernel allows may be less than what it says.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def check_host(settings: Settings) -> None:
    """Make sure that nobody is served whom nobody meant to serve.

    Raises:
        StartupError: The API would listen beyond this machine, without keys.
    """
    has_keys = settings.api_keys_file is not None
    if has_keys or settings.allow_unauthenticated or _is_loopback(settings.host):
        return
    raise StartupError(
        f"{PREFIX}HOST={settings.host} would let everybody who reaches this machine use the API; name a file of API keys "
        f"with {PREFIX}API_KEYS_FILE, or set {PREFIX}ALLOW_UNAUTHENTICATED=1 if that is meant"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def main() -> int:
    """Say in one sentence why gunicorn would not start with these settings, if so: `make up` asks; the exit status."""
    try:
        options(Settings.load())
    except StartupError as error:
        sys.stderr.write(f"mlx-pool: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
