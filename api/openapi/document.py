"""The complete description, and the resource that serves it. Built once per process."""

from __future__ import annotations

import hashlib

import falcon
import falcon.asgi
import msgspec

from api.anthropic import description as anthropic
from api.generation.request import VERSION
from api.openai.errors import ErrorBody
from api.openapi.components import HEADERS, STATUSES, Json, error_response, parameters, ref
from api.openapi.paths import paths
from api.openapi.schemas import schemas
from common.settings import Settings


class Description:
    """The falcon resource; its bytes are encoded once."""

    def __init__(self, settings: Settings) -> None:
        self._data = msgspec.json.encode(document(settings))
        self._etag = falcon.ETag(hashlib.sha256(self._data).hexdigest()[:32])

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        resp.etag = self._etag
        resp.cache_control = ["no-cache"]  # a cache may keep it, and has to revalidate it
        if any(known in ("*", self._etag) for known in req.if_none_match or ()):
            resp.status = falcon.HTTP_304
        else:
            resp.data = self._data

    on_head = on_get


def document(settings: Settings) -> Json:
    """The complete description."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mlx-pool",
            "description": "OpenAI-compatible answers from MLX models on any number of Macs.",
            "version": VERSION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "paths": paths(),
        "components": {
            "schemas": schemas(settings),
            "responses": {str(status): error_response(status) for status in STATUSES}
            | anthropic.responses(STATUSES, ref(ErrorBody)),
            "headers": HEADERS,
            "parameters": parameters(settings),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
            },
        },
    }
