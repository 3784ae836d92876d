"""A network namespace that has only loopback: what runs in it reaches nothing outside.

`command` starts a program in one; the program calls `enter` first. Needs Linux with user namespaces, no privileges.
"""

from __future__ import annotations

import fcntl
import shutil
import socket
import struct
import subprocess
import sys

_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1  # linux/sockios.h, linux/if.h
_UNSHARE = ["unshare", "--map-root-user", "--net"]


def refusal() -> str | None:
    """Why this machine has no such namespaces; None: it has."""
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return "network namespaces need Linux and util-linux's unshare"
    done = subprocess.run([*_UNSHARE, "true"], capture_output=True, text=True, check=False)
    return f"network namespaces are not permitted: {done.stderr.strip()}" if done.returncode else None


def command(arguments: list[str]) -> list[str]:
    """The command that runs `arguments` in a new namespace."""
    return [*_UNSHARE, "--", *arguments]


def enter() -> None:
    """Bring loopback up.

    Raises:
        RuntimeError: The process is not in a namespace of its own.
    """
    names = [name for _, name in socket.if_nameindex()]
    if names != ["lo"]:
        raise RuntimeError(f"this namespace has more than loopback: {names}")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sh", b"lo", 0)
        flags = struct.unpack("16sh", fcntl.ioctl(control, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sh", b"lo", flags | _IFF_UP))
