"""The file of API keys: names, dates and hashes, never the keys themselves; reloaded when it changes.

Written by `python -m api.keys`, read by `api.auth.authentication`. Independent of HTTP.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import hmac
import logging
import os
import secrets
import tempfile
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from common.errors import StartupError

log = logging.getLogger(__name__)

PREFIX = "sk-mlxpool-"

_CHECK_INTERVAL_SECONDS = 1.0
"""How often the file is checked for changes."""


class Key(msgspec.Struct, frozen=True):
    """One key.

    Attributes:
        name: Its owner; unique in the file.
        created: Such as ``2026-11-23``.
        sha256: In hexadecimal. A fast, unsalted hash is enough: a key has 256 random bits and cannot be guessed.
    """

    name: str
    created: str
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]

    @property
    def owner(self) -> str:
        """Of what is stored for this key: the name alone could be given to another key later."""
        return f"{self.sha256[:16]}:{self.name}"


class Keys(msgspec.Struct, frozen=True):
    """The content of the file."""

    keys: list[Key] = []

    def find(self, secret: str) -> Key | None:
        """The entry of a key, or None if it is not in the file. The time does not depend on which key matches."""
        digest = _digest(secret)
        found: Key | None = None
        for key in self.keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found


def new_key(name: str) -> tuple[Key, str]:
    """Create a key: its entry for the file, and the secret, which is stored nowhere."""
    secret = PREFIX + secrets.token_urlsafe(32)
    return Key(name, time.strftime("%Y-%m-%d", time.gmtime()), _digest(secret)), secret


def read(path: Path) -> Keys:
    """Read a key file.

    Raises:
        StartupError: The file is missing, unreadable or malformed.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Keys)
    except FileNotFoundError:
        raise StartupError(
            f"the key file {path} does not exist; `.venv/bin/python -m api.keys add NAME` creates it"
        ) from None
    except OSError as error:
        raise StartupError(f"the key file {path} cannot be read: {error.strerror}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StartupError(f"{path} is not a file of API keys: {error}") from None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock the file against other commands: one that read it earlier could otherwise restore a revoked key.

    Raises:
        StartupError: The folder cannot be created or opened.
    """
    # The lock is on the folder, since the file itself is replaced.
    folder = path.resolve().parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise StartupError(f"the key file {path} cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def write(path: Path, keys: Keys) -> None:
    """Replace the file atomically; only its owner can read it.

    Raises:
        StartupError: The file cannot be written.
    """
    path = path.resolve()  # replaces the target of a symbolic link, not the link
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)  # created with mode 0600
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(keys)) + b"\n")
                if path.exists():  # keeps the owner if root writes a file of another user's API
                    with contextlib.suppress(PermissionError):
                        os.fchown(handle, path.stat().st_uid, path.stat().st_gid)
            Path(name).replace(path)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StartupError(f"the key file {path} cannot be written: {error.strerror}") from None


class KeyFile:
    """The current keys. If the file becomes unreadable, the last good keys stay in force, and an error is logged once.

    The last good keys are shared by all processes that are forked after this was created. A process that starts while the
    file is broken would otherwise use what its parent had read, and accept keys that were revoked since.

    Args:
        path: The file, which has to be readable at first.

    Raises:
        StartupError: As `read`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._version = self._stat()  # before the first read, so that a change during it is noticed
        self._keys = read(path)
        self._last_error = ""
        self._checked_at_mono = time.monotonic()
        self._last_good, name = tempfile.mkstemp()  # an unnamed temporary file of hashes
        Path(name).unlink()
        weakref.finalize(self, os.close, self._last_good)
        self._share()

    @property
    def keys(self) -> Keys:
        """The keys as of at most a second ago."""
        now = time.monotonic()
        if now - self._checked_at_mono >= _CHECK_INTERVAL_SECONDS:
            self._checked_at_mono = now
            version = self._stat()
            if version != self._version or self._last_error:
                self._version = version
                self._reload()
        return self._keys

    def _stat(self) -> tuple[int, ...] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        # ctime also changes with the permissions.
        return (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    def _reload(self) -> None:
        try:
            self._keys = read(self._path)
        except StartupError as error:
            self._keys = self._shared()
            if str(error) != self._last_error:
                log.error("%s; the %d keys that were read before stay in force", error, len(self._keys.keys))  # noqa: TRY400 (no traceback)
            self._last_error = str(error)
        else:
            self._last_error = ""
            self._share()
            log.info("reloaded %d API keys", len(self._keys.keys))

    def _share(self) -> None:
        data = msgspec.json.encode(self._keys)
        try:
            # In one write, padded with spaces over the rest of a longer version.
            os.pwrite(self._last_good, data.ljust(os.fstat(self._last_good).st_size), 0)
        except OSError:
            os.ftruncate(self._last_good, 0)

    def _shared(self) -> Keys:
        """The last good keys; no keys at all if they cannot be read, so that every request is refused."""
        try:
            size = os.fstat(self._last_good).st_size
            return msgspec.json.decode(os.pread(self._last_good, size, 0), type=Keys)
        except (OSError, msgspec.MsgspecError):
            return Keys()


@functools.cache
def opened(path: Path) -> KeyFile:
    """The one `KeyFile` of a path: gunicorn's master opens it, and the processes that it forks inherit it.

    Raises:
        StartupError: As `KeyFile`.
    """
    return KeyFile(path)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
