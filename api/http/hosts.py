"""Which host names the API answers to without API keys: the defence against DNS rebinding.

A page of evil.example can let its name resolve to 127.0.0.1 and then call the API as its own origin, past CORS. Its
requests still carry `Host: evil.example`. `HostCheck` is falcon middleware, installed only if there are no keys: a
rebinding page has none to send. Independent of what a request asks for.
"""

from __future__ import annotations

import ipaddress
import re
import socket

import falcon.asgi

from api.http.open_paths import HEALTH_PATHS
from api.http.origins import MAX_ORIGIN_CHARS, Origins
from common.errors import RequestError
from common.settings import PREFIX

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/@\[\].][^\s:/@\[\]]*)(:[0-9]*)?")
_LOCAL_SUFFIXES = (".local", ".internal", ".home.arpa", ".lan", ".home", ".localdomain", ".corp")
"""Names that public DNS does not have (RFC 6762, RFC 8375, ICANN's reservation of .internal), or has refused to delegate."""

_CONTAINER_HOSTS = ("host.docker.internal", "host.containers.internal")
"""This machine, as containers of Docker Desktop and Podman on it call it."""


def is_loopback(host: str) -> bool:
    """Whether a host, a name or an IP address without brackets, is this machine's loopback."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Hosts:
    """The host names that requests may carry.

    Always: IP addresses, which DNS cannot rebind; `localhost` and names below it; the host that the API listens on; this
    machine's own name, also with `.local`, and the names that containers on it have for it; hosts of the origins that `MLXPOOL_CORS_ORIGINS` lists. Any host if that is `*`.

    If the API listens beyond loopback: also names without a dot and local ones such as `mac.local` or `mac.lan`. Only the local network can forge these, and it reaches such an API anyway.

    Args:
        listen_host: Where the API listens.
        origins: Which pages may call.
    """

    def __init__(self, listen_host: str, origins: Origins) -> None:
        self._listen_host = listen_host.lower()
        self._is_loopback = is_loopback(listen_host)
        self._origins = origins

    def allows(self, host_header: str | None) -> bool:
        """Whether a request with this `Host` may be served; one without comes from no browser."""
        if host_header is None or host_header == "" or self._origins.is_any:
            return True
        match = _HOST.fullmatch(host_header)
        if match is None or len(host_header) > MAX_ORIGIN_CHARS:
            return False
        name = match[1].lower().removesuffix(".")
        return (
            _is_ip_address(name)
            or name in ("localhost", self._listen_host, *_CONTAINER_HOSTS)
            or name.endswith(".localhost")
            or self._origins.lists_host(name)
            or name in _own_names()
            or (not self._is_loopback and ("." not in name or name.endswith(_LOCAL_SUFFIXES)))
        )


def _is_ip_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _own_names() -> set[str]:
    """Looked up each time: a laptop's name changes with its network."""
    name = socket.gethostname().lower()
    short = name.partition(".")[0]
    return {name, short, f"{short}.local"} - {"", ".local"}


class HostCheck:
    """Refuses requests that carry another host name; health checks are answered under any."""

    def __init__(self, hosts: Hosts) -> None:
        self._hosts = hosts

    async def process_request(self, req: falcon.asgi.Request, _resp: falcon.asgi.Response) -> None:
        """Raises:
        RequestError: 403.
        """
        host = req.get_header("host")
        if self._hosts.allows(host) or req.path in HEALTH_PATHS:
            return
        raise RequestError(
            f"This API does not answer to the host name `{(host or '')[:100]}`. Without API keys it accepts only names of this "
            "machine, as a protection against DNS rebinding. Use localhost or an IP address; or, if this is the name of a "
            f"proxy, set {PREFIX}CORS_ORIGINS to local,https://{(host or '')[:100]} or whatever its origin is.",
            status=403,
            code="host_not_allowed",
        )
