"""`GET /` and `GET /v1`: what answers here, for people and for clients that look at a base address first."""

from __future__ import annotations

from collections.abc import Sequence

import falcon.asgi
import msgspec

from api.generation.request import VERSION

PATHS = ("/", "/v1")


class About(msgspec.Struct, frozen=True, kw_only=True):
    """What answers here.

    Attributes:
        endpoints: Such as ``POST /v1/chat/completions``.
        description: The path of the OpenAPI description.
    """

    name: str
    version: str
    endpoints: list[str]
    description: str


class Root:
    """The falcon resource.

    Args:
        endpoints: As in `About`.
    """

    def __init__(self, endpoints: Sequence[str], description: str) -> None:
        about = About(name="mlx-pool", version=VERSION, endpoints=list(endpoints), description=description)
        self._data = msgspec.json.encode(about)

    async def on_get(self, _req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        resp.data = self._data

    on_head = on_get
