"""gunicorn's configuration, made from our settings, and the checks that prevent an unsafe start.

Called by `api/gunicorn.conf.py` before any process is forked, and by `make up` as `python -m api.server`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import resource
import sys
from pathlib import Path
from typing import Any

from gunicorn.glogging import Logger  # type: ignore[import-untyped]

from api.auth import key_file
from api.http import connection
from api.http.hosts import is_loopback
from api.http.origins import Origins
from api.protocols import ERROR_FORMATS
from common import connections, garbage
from common import logging as common_logging
from common.errors import StartupError
from common.models import model_aliases
from common.settings import PREFIX, Settings

KEEP_ALIVE_SECONDS = 15
"""Longer than Python's clients keep an idle connection (5 s), so that the client closes first and no request is cut off."""

BACKLOG = 2048
MAX_LINE_BYTES = 8190
MAX_HEADERS = 100
MAX_HEADER_BYTES = 16 * 1024
KILL_SECONDS = 5

OPEN_FILES = 10_240
"""The highest limit that every macOS accepts (OPEN_MAX). Each connection needs one, and the process a few more."""


def options(settings: Settings) -> dict[str, Any]:
    """gunicorn's settings.

    Raises:
        StartupError: The API may not listen there, its key file cannot be read, or its origins, aliases or Redis URL are malformed.
    """
    check_host(settings)
    raise_open_files_limit()
    origins = Origins.from_settings(settings)
    model_aliases.parse(settings.model_aliases)
    if settings.api_keys_file is not None:
        key_file.opened(Path(settings.api_keys_file).expanduser())  # inherited by all forked processes
    connections.connect(settings.redis_url).close()  # only parses the URL; no connection is made

    def post_fork(_arbiter: Any, _worker: Any) -> None:
        common_logging.configure(settings.log_level)
        for handler in logging.getLogger("gunicorn.error").handlers:
            handler.setFormatter(common_logging.Formatter(Logger.error_fmt, Logger.datefmt))

    def post_worker_init(worker: Any) -> None:
        # gunicorn 27's asgi worker calls listen() again without its backlog. With asyncio's default of 100, connections of
        # a larger burst wait a second until their SYNs are retransmitted.
        worker.loop.create_server = functools.partial(worker.loop.create_server, backlog=worker.cfg.backlog)
        # The master kills its workers after its own graceful_timeout. A worker's must end earlier, so that it can still
        # cancel running requests.
        worker.cfg.set("graceful_timeout", int(settings.drain_seconds))

        connection.install(
            settings.header_seconds, settings.take_seconds, origins.headers_without_request, ERROR_FORMATS
        )
        garbage.freeze_loaded_objects()

    def worker_int(worker: Any) -> None:
        # On SIGINT gunicorn skips the lifespan shutdown. With this it runs: nothing is drained, but requests are cancelled.
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
        "control_socket_disable": True,  # gunicorn 27 would create one in the home folder
        "accesslog": None,  # we log a line per request that has more
        "loglevel": settings.log_level.lower(),
        "proc_name": "mlx-pool-api",
        "post_fork": post_fork,
        "post_worker_init": post_worker_init,
        "worker_int": worker_int,
    }


def raise_open_files_limit() -> None:
    """Raise the soft limit of open files, which is 256 in a Mac's shell, for this process and its children."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    # macOS's kernel may allow less than the hard limit that it reports.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def check_host(settings: Settings) -> None:
    """Refuse to serve other machines without API keys, unless the settings allow it.

    Raises:
        StartupError: The API would listen beyond this machine, without keys.
    """
    has_keys = settings.api_keys_file is not None
    if has_keys or settings.allow_unauthenticated or is_loopback(settings.host):
        return
    raise StartupError(
        f"{PREFIX}HOST={settings.host} would let everybody who reaches this machine use the API; set "
        f"{PREFIX}API_KEYS_FILE to a file of API keys, or {PREFIX}ALLOW_UNAUTHENTICATED=1 to allow that"
    )


def main() -> int:
    """Check the settings as gunicorn would; print the error in one sentence. Returns the exit status."""
    try:
        options(Settings.load())
    except StartupError as error:
        sys.stderr.write(f"mlx-pool: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
