"""Which web pages may call the API: CORS (fetch.spec.whatwg.org, section 3.3), and the refusal of other origins.

`Origins` is the policy; `api.server` validates the setting with it. `CrossOrigin` is falcon middleware, called for each
request and each response, errors included. It runs after `api.http.hosts`, before keys are checked. Independent of
what a request asks for.
"""

from __future__ import annotations

import re
from typing import Any

import falcon.asgi

from api.http.open_paths import HEALTH_PATHS
from common.errors import RequestError, StartupError
from common.settings import PREFIX, Settings

_LOCAL_HOSTS = ("localhost", "*.localhost", "127.0.0.1", "[::1]", "0.0.0.0")  # noqa: S104 (a browser may open it)
_APP_SCHEMES = ("app", "file", "tauri", "vscode-webview", "vscode-file")
LOCAL_ORIGINS = (
    *(
        f"{scheme}://{host}{port}"
        for scheme in ("http", "https")
        for host in _LOCAL_HOSTS
        for port in ("", ":*")
    ),
    *(f"{scheme}://*" for scheme in _APP_SCHEMES),
)
"""Pages of this machine and desktop apps, as Ollama allows them. `null` is not among them: every page can make a
sandboxed frame of that origin."""

EXPOSED_HEADERS = "x-request-id, request-id, x-ignored-parameters, x-stream-id, x-should-retry, retry-after"
ALLOWED_HEADERS = "authorization, x-api-key, anthropic-version, content-type, last-event-id, x-request-id, x-request-timeout, x-resumable"
"""By name: browsers do not accept `*` for authorization."""

ALLOWED_METHODS = "GET, HEAD, POST, OPTIONS"
PREFLIGHT_MAX_AGE_SECONDS = 3600

MAX_ORIGIN_CHARS = 300
"""A host name has at most 253; a longer header is not matched, which with wildcards could take long."""

_ENTRY = re.compile(r"null|[a-z][a-z0-9+.-]*://[^\s/,?#@]*", re.IGNORECASE)
_HTTP_HOST = re.compile(r"https?://(.*?)(:[0-9*]*)?", re.IGNORECASE)
_SAFE_HEADER_NAMES = re.compile(r"[A-Za-z0-9_, -]{1,2048}")
_NOTHING = re.compile(r"(?!)")


class Origins:
    """The origins that may call the API.

    Args:
        setting: `MLXPOOL_CORS_ORIGINS`: origins separated by commas, in which `*` stands for any name or port; a lone `*`
            for any origin; `local` for `LOCAL_ORIGINS`. None: any origin if there are API keys, which a page would need; otherwise `LOCAL_ORIGINS`.
        has_keys: Whether requests need an API key.

    Attributes:
        is_any: Whether every origin may call.

    Raises:
        StartupError: An entry of the setting is not an origin.
    """

    def __init__(self, setting: str | None, *, has_keys: bool) -> None:
        given = [entry.strip() for entry in (setting or "").split(",") if entry.strip()]
        entries = [each for entry in given for each in (LOCAL_ORIGINS if entry == "local" else (entry,))]
        entries = [entry if entry.endswith("://") else entry.removesuffix("/") for entry in entries]
        self.is_any = "*" in entries or (not entries and has_keys)
        for entry in entries:
            if entry != "*" and not _ENTRY.fullmatch(entry):
                raise StartupError(
                    f"{PREFIX}CORS_ORIGINS must be * or origins such as https://app.example or http://localhost:*, "
                    f"separated by commas, not {entry!r}"
                )
        self._origin_pattern = _any_of(entries or LOCAL_ORIGINS)
        self._host_pattern = _any_of(
            [match[1] for match in map(_HTTP_HOST.fullmatch, entries) if match and match[1] != "*"]
        )

    @classmethod
    def from_settings(cls, settings: Settings) -> Origins:
        """Raises:
        StartupError: As `Origins`.
        """
        return cls(settings.cors_origins, has_keys=settings.api_keys_file is not None)

    def allows(self, origin: str) -> bool:
        """Whether pages of this origin may call."""
        if self.is_any:
            return True
        return len(origin) <= MAX_ORIGIN_CHARS and self._origin_pattern.fullmatch(origin) is not None

    def lists_host(self, host: str) -> bool:
        """Whether the setting lists an origin with this host name; one that stands for every name lists none."""
        return self._host_pattern.fullmatch(host) is not None

    @property
    def headers_without_request(self) -> dict[str, str]:
        """Headers of a response to a request whose own headers could not be parsed, so that its origin is unknown."""
        if not self.is_any:
            return {}
        return {"access-control-allow-origin": "*", "access-control-expose-headers": EXPOSED_HEADERS}


def _any_of(patterns: list[str] | tuple[str, ...]) -> re.Pattern[str]:
    """One expression for all; `*` matches what a host name or a port consists of, nothing included."""
    if not patterns:
        return _NOTHING
    alternatives = ("[a-z0-9._-]*".join(map(re.escape, pattern.split("*"))) for pattern in patterns)
    return re.compile("|".join(alternatives), re.IGNORECASE)


class CrossOrigin:
    """Refuses requests of foreign origins, answers preflights, and adds the CORS headers to every response.

    A refusal is a 403 before the request is read, since a page can send a POST without a preflight: it could not read the
    response, but the pool would generate it. Health checks are answered, without permission for the page to read them.
    """

    def __init__(self, origins: Origins) -> None:
        self._origins = origins

    async def process_request(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """Raises:
        RequestError: 403, the origin may not call.
        """
        origin = req.get_header("origin")
        if origin is not None and not self._is_allowed(req, origin) and req.path not in HEALTH_PATHS:
            raise RequestError(
                f"Web pages of the origin `{origin[:100]}` may not call this API. If they should, set {PREFIX}CORS_ORIGINS to "
                f"local,{origin[:100]}, or to * to allow all.",
                status=403,
                code="origin_not_allowed",
            )
        if req.method == "OPTIONS" and req.get_header("access-control-request-method") is not None:
            # Granted for any path and method, so that the page can read the 404 or 405 of the request that follows.
            resp.complete = True

    async def process_response(
        self, req: falcon.asgi.Request, resp: falcon.asgi.Response, _resource: Any, _succeeded: bool
    ) -> None:
        if self._origins.is_any:
            resp.set_header("access-control-allow-origin", "*")
        else:
            resp.append_header("vary", "Origin")
            origin = req.get_header("origin")
            if origin is None or not self._origins.allows(origin):
                return
            resp.set_header("access-control-allow-origin", origin)
        resp.set_header("access-control-expose-headers", EXPOSED_HEADERS)
        if req.method == "OPTIONS":
            _add_preflight_headers(req, resp)

    def _is_allowed(self, req: falcon.asgi.Request, origin: str) -> bool:
        """Also if the page is of the same origin, such as one that a proxy serves next to the API; it needs no CORS headers."""
        scheme, _, host = origin.partition("://")
        is_same_origin = scheme in ("http", "https") and host == req.get_header("host")
        return is_same_origin or self._origins.allows(origin)


def _add_preflight_headers(req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
    requested = req.get_header("access-control-request-headers") or ""
    more = [name.strip() for name in requested.split(",")] if _SAFE_HEADER_NAMES.fullmatch(requested) else []
    names = dict.fromkeys([*ALLOWED_HEADERS.split(", "), *(name.lower() for name in more if name)])
    resp.set_header("access-control-allow-methods", ALLOWED_METHODS)
    resp.set_header("access-control-allow-headers", ", ".join(names))
    resp.set_header("access-control-max-age", str(PREFLIGHT_MAX_AGE_SECONDS))
    if req.get_header("access-control-request-private-network") == "true":
        # Chrome asks for this when a public page calls an address of a private network or of this machine.
        resp.set_header("access-control-allow-private-network", "true")
