"""`python -m api.keys`: create, list and revoke API keys.

A key is shown once, when it is created; the file keeps its hash. A running API applies a change within a second.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from api.auth import key_file
from api.auth.key_file import Keys
from common.errors import StartupError
from common.settings import PREFIX, Settings


def add(path: Path, name: str) -> str:
    """Create a key and return its secret.

    Raises:
        StartupError: The name is taken or not printable, or the file cannot be read or written.
    """
    if not name.strip() or not name.isprintable():
        raise StartupError("a key needs a printable name, such as its owner's")
    with key_file.locked(path):
        keys = key_file.read(path) if os.path.lexists(path) else Keys()
        if any(key.name == name for key in keys.keys):
            raise StartupError(
                f"a key named {name!r} exists already; revoke it first, or choose another name"
            )
        key, secret = key_file.new_key(name)
        key_file.write(path, Keys([*keys.keys, key]))
    return secret


def revoke(path: Path, name: str) -> None:
    """Revoke a key.

    Raises:
        StartupError: There is no key of that name, or the file cannot be read or written.
    """
    with key_file.locked(path):
        keys = key_file.read(path)
        remaining = [key for key in keys.keys if key.name != name]
        if len(remaining) == len(keys.keys):
            raise StartupError(f"there is no key named {name!r} in {path}")
        key_file.write(path, Keys(remaining))


def _key_path(flag: str | None) -> Path:
    path = flag or Settings.load().api_keys_file
    if path is None:
        raise StartupError(f"no key file is set; use --file or {PREFIX}API_KEYS_FILE")
    return Path(path).expanduser()


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m api.keys", description="Create, list and revoke API keys."
    )
    parser.add_argument("--file", help=f"the key file (default: {PREFIX}API_KEYS_FILE)")
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("add", help="create a key and show it, once").add_argument("name")
    actions.add_parser("list", help="list names and dates")
    actions.add_parser("revoke", help="revoke a key").add_argument("name")
    arguments = parser.parse_args()
    try:
        path = _key_path(arguments.file)
        match arguments.action:
            case "add":
                sys.stdout.write(f"{add(path, arguments.name)}\n")
            case "list":
                keys = key_file.read(path).keys
                for key in keys:
                    sys.stdout.write(f"{key.created}  {key.name}\n")
                if not keys:
                    sys.stdout.write("no keys\n")
            case _:
                revoke(path, arguments.name)
                sys.stdout.write(f"revoked {arguments.name}\n")
    except StartupError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
