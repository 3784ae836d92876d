"""Checks `Authorization: Bearer KEY` or `X-Api-Key: KEY` against the key file, before routing and before the body is read.

falcon middleware, installed by `api.app` if there is a key file. Health checks, the API's description, its name at `/` and
preflights need no key. Independent of routes and protocols.
"""

from __future__ import annotations

import logging

import falcon.asgi

from api.auth.key_file import KeyFile
from api.http.open_paths import HEALTH_PATHS
from common.errors import RequestError

log = logging.getLogger(__name__)

_OPEN_PATHS = (*HEALTH_PATHS, "/openapi.json", "/", "/v1")


class Authentication:
    """Refuses requests without a valid key.

    Args:
        file: The current keys.
    """

    def __init__(self, file: KeyFile) -> None:
        self._file = file

    async def process_request(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """Raises:
        RequestError: 401.
        """
        if req.path in _OPEN_PATHS or req.method == "OPTIONS":
            return
        secrets = _secrets(req)
        if not secrets:
            raise _unauthorized(
                resp,
                "You didn't provide an API key. Send one in the header `Authorization: Bearer YOUR_KEY` or `X-Api-Key: YOUR_KEY`.",
            )
        key = next(filter(None, map(self._file.keys.find, secrets)), None)
        if key is None:
            raise _unauthorized(resp, "The API key is invalid or was revoked.")
        req.context.api_key_name = name = (
            key.name if key.name.isprintable() else repr(key.name)
        )  # it is logged
        req.context.owner = key.owner
        log.debug("request %s: authenticated with the key of %s", req.context.request_id, name)


def _secrets(req: falcon.asgi.Request) -> list[str]:
    """The keys that a request has: OpenAI's clients send a bearer token, Anthropic's `X-Api-Key`, and some of them both."""
    scheme, _, token = (req.get_header("authorization") or "").strip().partition(" ")
    sent = (token if scheme.lower() == "bearer" else "", req.get_header("x-api-key") or "")
    return [secret.strip() for secret in sent if secret.strip()]


def _unauthorized(resp: falcon.asgi.Response, message: str) -> RequestError:
    resp.set_header("www-authenticate", "Bearer")
    return RequestError(message, status=401, code="invalid_api_key")
