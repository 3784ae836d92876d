"""The file of API keys: names, dates and hashes, never a key. Read again when it changes.

Written by `python -m api.keys`, read by the API's middleware. Knows no HTTP.
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

_LOOK_SECONDS = 1.0
"""Between two looks at whether the file has changed."""


class Key(msgspec.Struct, frozen=True):
    """One key.

    Attributes:
        name: Whose it is; unique.
        created: Such as ``2026-11-23``.
        sha256: In hexadecimal. A plain hash is enough: a key has 256 random bits, which nobody guesses however fast.
    """

    name: str
    created: str
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class Keys(msgspec.Struct, frozen=True):
    """What is in the file."""

    keys: list[Key] = []

    def name_of(self, secret: str) -> str | None:
        """Whose key this is; takes the same time whichever it is, or none."""
        digest, found = _digest(secret), None
        for key in self.keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key.name
        return found


def new_key(name: str) -> tuple[Key, str]:
    """A key's entry, and the key itself, which is not kept anywhere."""
    secret = PREFIX + secrets.token_urlsafe(32)
    return Key(name, time.strftime("%Y-%m-%d", time.gmtime()), _digest(secret)), secret


def read(path: Path) -> Keys:
    """The keys of a file.

    Raises:
        StartupError: It cannot be read, or is no file of keys.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Keys)
    except FileNotFoundError:
        raise StartupError(
            f"the key file {path} does not exist; `.venv/bin/python -m api.keys add NAME` makes it"
        ) from None
    except OSError as error:
        raise StartupError(f"the key file {path} cannot be read: {error.strerror}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StartupError(f"{path} is no file of API keys: {error}") from None


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keep other commands waiting meanwhile: what they read before would bring a revoked key back.

    Raises:
        StartupError: There can be no such file.
    """
    # The folder is locked, since the file itself is replaced.
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
    """Replace the file at once, for its owner's eyes only.

    Raises:
        StartupError: It cannot be written.
    """
    path = path.resolve()  # a symbolic link stays one
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)  # of mode 0600
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(keys)) + b"\n")
                if path.exists():  # by root, for an API that runs as somebody else
                    with contextlib.suppress(PermissionError):
                        os.fchown(handle, path.stat().st_uid, path.stat().st_gid)
            Path(name).replace(path)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StartupError(f"the key file {path} cannot be written: {error.strerror}") from None


class KeyFile:
    """The keys as they are now. A file that became unreadable leaves the last good ones, and is complained of once.

    The last good ones are those that any of the processes has read that were forked from where this was made: one that
    starts beside a broken file would otherwise go by what its parent knew, and let in whose key was revoked since.

    Args:
        path: Has to be a good one at first.

    Raises:
        StartupError: It is not.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._mark = self._look()  # first: what is written while it is read is noticed
        self._keys = read(path)
        self._complaint = ""
        self._looked_at = time.monotonic()
        self._last_good, name = tempfile.mkstemp()  # hashes, in a file without a name
        Path(name).unlink()
        weakref.finalize(self, os.close, self._last_good)
        self._share()

    @property
    def keys(self) -> Keys:
        """As of a second ago at most."""
        now = time.monotonic()
        if now - self._looked_at >= _LOOK_SECONDS:
            self._looked_at = now
            mark = self._look()
            if mark != self._mark or self._complaint:
                self._mark = mark
                self._read_again()
        return self._keys

    def _look(self) -> tuple[int, ...] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return (
            status.st_ino,
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
        )  # the last for permissions

    def _read_again(self) -> None:
        try:
            self._keys = read(self._path)
        except StartupError as error:
            self._keys = self._shared()
            if str(error) != self._complaint:
                log.error("%s; the %d keys read before stay", error, len(self._keys.keys))  # noqa: TRY400 (the sentence says it all)
            self._complaint = str(error)
        else:
            self._complaint = ""
            self._share()
            log.info("%d API keys", len(self._keys.keys))

    def _share(self) -> None:
        data = msgspec.json.encode(self._keys)
        try:
            # In one piece, with spaces over what is left of a longer one.
            os.pwrite(self._last_good, data.ljust(os.fstat(self._last_good).st_size), 0)
        except OSError:
            os.ftruncate(self._last_good, 0)

    def _shared(self) -> Keys:
        """None at all where they cannot be read: then nobody gets in."""
        try:
            size = os.fstat(self._last_good).st_size
            return msgspec.json.decode(os.pread(self._last_good, size, 0), type=Keys)
        except (OSError, msgspec.MsgspecError):
            return Keys()


@functools.cache
def opened(path: Path) -> KeyFile:
    """The one `KeyFile` of a path; gunicorn's master opens it, its processes inherit it.

    Raises:
        StartupError: As `KeyFile`.
    """
    return KeyFile(path)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
