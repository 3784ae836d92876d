"""Parts that the descriptions of many endpoints share: statuses, headers, parameters, responses, security.

Used by the other modules of this package. Must not know any one endpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import falcon

from api.anthropic import description as anthropic
from api.openai.errors import ErrorBody
from api.openai.responses import description as stored
from common.settings import Settings

Json = dict[str, Any]

JSON = falcon.MEDIA_JSON
REF = "#/components/schemas/{name}"

STATUSES: Mapping[int, str] = {
    400: "Something in the request is wrong or not supported; `param` names it.",
    401: "The API key is missing or invalid.",
    403: "A page of this origin may not call the API, or the API does not answer to this host name.",
    404: "The model, the stream, or what else the request names does not exist.",
    405: "The path does not support the method; `Allow` lists those that it does.",
    408: "The request's body did not arrive in time.",
    409: "The response that the request continues is still being generated.",
    413: "The request's body is too large.",
    414: "The request's URL is too long.",
    415: "The request's body is not declared as JSON, or is compressed.",
    429: "The model's queue is full; `Retry-After` says when to try again.",
    431: "The request's headers are too large.",
    500: "An error in the server.",
    501: "The request's Transfer-Encoding is not supported.",
    503: "The queue is unavailable or the store of answers full, or the model has no worker at the moment.",
    504: "The answer was not complete by the request's deadline.",
}
TOO_MANY_REQUESTS, UNAVAILABLE, NOT_ALLOWED, CONFLICT = 429, 503, 405, 409

_ALWAYS = (400, 405, 414, 431, 500, 501)
GENERATING_STATUSES = (401, 403, 404, 408, 413, 415, 429, 503, 504)

HEADERS: Mapping[str, Json] = {
    "X-Request-Id": {
        "description": "The request's own if it is well-formed, otherwise a new one.",
        "required": True,
        "schema": {"type": "string"},
    },
    "X-Should-Retry": {
        "description": "`false` if a retry cannot help, whatever the status is.",
        "schema": {"const": "false"},
    },
    "Retry-After": {"description": "In seconds.", "schema": {"type": "integer", "minimum": 1}},
    "Allow": {"description": "The path's methods.", "required": True, "schema": {"type": "string"}},
    "X-Ignored-Parameters": {
        "description": "Unknown fields of the request.",
        "schema": {"type": "string"},
    },
    "X-Stream-Id": {
        "description": "With `X-Resumable`: the id under which `/streams/{stream_id}` continues the stream.",
        "schema": {"type": "string"},
    },
    "ETag": {"required": True, "schema": {"type": "string"}},
}


def ref(kind: Any) -> Json:
    return {"$ref": REF.format(name=kind.__name__)}


def error_response(status: int) -> Json:
    names = ["X-Request-Id"]
    if status in (TOO_MANY_REQUESTS, UNAVAILABLE, CONFLICT):
        names.append("Retry-After")
    if status == NOT_ALLOWED:
        names.append("Allow")
    return response(STATUSES[status], ErrorBody, [*names, "X-Should-Retry"])


def response(description: str, kind: Any, headers: Sequence[str] = ("X-Request-Id",)) -> Json:
    return {
        "description": description,
        "headers": headers_of(headers),
        "content": {JSON: {"schema": ref(kind)}},
    }


def headers_of(names: Sequence[str]) -> Json:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def responses_of(ok: Json, statuses: Sequence[int]) -> Json:
    """All responses by status; `ok` are those that only this endpoint has."""
    errors = {str(status): {"$ref": f"#/components/responses/{status}"} for status in [*_ALWAYS, *statuses]}
    return dict(sorted((errors | ok).items()))


def parameters(settings: Settings) -> Json:
    return {
        "RequestId": {
            "name": "X-Request-Id",
            "in": "header",
            "description": "An id for logs; a new one replaces it if it is malformed.",
            "schema": {"type": "string"},
        },
        "RequestTimeout": {
            "name": "X-Request-Timeout",
            "in": "header",
            "description": "The request's deadline in seconds.",
            "schema": {"type": "number", "exclusiveMinimum": 0, "maximum": settings.request_seconds},
        },
        "Resumable": {
            "name": "X-Resumable",
            "in": "header",
            "description": (
                "Whether generation goes on without the client, which can continue the stream at `/streams/{stream_id}`; needs "
                "`stream`."
            ),
            "schema": {"type": "string", "pattern": "^([Tt][Rr][Uu][Ee]|[Ff][Aa][Ll][Ss][Ee])$"},
        },
        "StreamId": {
            "name": "stream_id",
            "in": "path",
            "required": True,
            "description": "As the header `X-Stream-Id` of the stream's response gives it.",
            "schema": {"type": "string", "minLength": 1, "pattern": "^[^/]+$"},
        },
        "LastEventId": {
            "name": "Last-Event-ID",
            "in": "header",
            "description": "The id of the last frame that the client has; without it, the stream comes from its start.",
            "schema": {"type": "string", "pattern": "^(.+:[0-9]{1,9})?$"},
        },
        "StartingAfter": {
            "name": "starting_after",
            "in": "query",
            "description": "In place of `Last-Event-ID`: the number at the end of that id.",
            "schema": {"type": "integer", "minimum": 0, "maximum": 999_999_999},
        },
        "ModelId": {
            "name": "model_id",
            "in": "path",
            "required": True,
            "description": "As `/models` lists it; a slash may be sent as `/` or as `%2F`.",
            "schema": {"type": "string", "minLength": 1},
        },
        **anthropic.parameters(),
        **stored.parameters(),
    }


def parameter(name: str) -> Json:
    return {"$ref": f"#/components/parameters/{name}"}


def security() -> list[Json]:
    """A key, or none where the server asks for none."""
    return [{"bearer": []}, {"key": []}, {}]
