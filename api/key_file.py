"""The file of API keys: names, dates and hashes, never a key. Read again when it changes.

Written by `python -m api.keys`, read by the API's middleware. Knows no HTTP.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import tempfile
import time
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
            f"the key file {path} does not exist; `python -m api.keys add NAME` makes it"
        ) from None
    except OSError as error:
        raise StartupError(f"the key file {path} cannot be read: {error.strerror}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StartupError(f"{path} is no file of API keys: {error}") from None


def write(path: Path, keys: Keys) -> None:
    """Replace the file at once, for its owner's eyes only.

    Raises:
        StartupError: It cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)  # of mode 0600
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(keys)) + b"\n")
            Path(name).replace(path)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StartupError(f"the key file {path} cannot be written: {error.strerror}") from None


class KeyFile:
    """The keys as they are now. A file that became unreadable changes nothing, and is complained of once.

    Args:
        path: Has to be a good one at first.

    Raises:
        StartupError: It is not.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._keys = read(path)
        self._mark = self._look()
        self._looked_at = time.monotonic()

    @property
    def keys(self) -> Keys:
        """As of a second ago at most."""
        now = time.monotonic()
        if now - self._looked_at >= _LOOK_SECONDS:
            self._looked_at = now
            if (mark := self._look()) != self._mark:
                self._mark = mark
                self._read_again()
        return self._keys

    def _look(self) -> tuple[int, ...] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns

    def _read_again(self) -> None:
        try:
            self._keys = read(self._path)
        except StartupError as error:
            log.error("%s; the keys read before stay", error)  # noqa: TRY400 (the sentence says it all)
        else:
            log.info("%d API keys", len(self._keys.keys))


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
