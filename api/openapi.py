"""`GET /openapi.json`: the OpenAPI description of all endpoints, for client generators, gateways and fuzzers.

Generated from the types that parse requests and from the tables that the checks use (`NEUTRAL`, `ONLY_WITH`), so that it
cannot differ from the code. Statuses and headers are described here. Built once per process.
https://spec.openapis.org/oas/v3.1.1
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import falcon
import falcon.asgi
import msgspec

from api import about, health
from api.anthropic import description as anthropic
from api.generation.request import VERSION
from api.openai import models
from api.openai.answer_types import ChatCompletion, ChatCompletionChunk, Completion, CompletionChunk
from api.openai.chat import request as chat_request
from api.openai.completions import request as completion_request
from api.openai.errors import ErrorBody
from api.openai.responses import description as responses
from api.openai.responses import request as response_request
from api.openai.responses.answer_types import ResponseEvent, ResponseObject
from api.openai.tokenize import request as tokenize_request
from api.openai.tokenize.resources import DetokenizeResponse, TokenizeResponse
from common.settings import Settings

Json = dict[str, Any]

PATH = "/openapi.json"
PREFIXES = ("/v1", "")
MODEL_PATH = "/models/{model_id}"
STREAM_PATH = "/streams/{stream_id}"

_JSON = falcon.MEDIA_JSON
_REF = "#/components/schemas/{name}"

_STATUSES: Mapping[int, str] = {
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
_TOO_MANY_REQUESTS, _UNAVAILABLE, _NOT_ALLOWED, _CONFLICT = 429, 503, 405, 409

_STORED = (401, 403, 404, 503)
_ALWAYS = (400, 405, 414, 431, 500, 501)
_OPEN = (403,)
_LISTING = (401, 403, 503)
_ONE_MODEL = (401, 403, 404, 503)
_TOKENIZING = (401, 403, 404, 408, 413, 415, 503)
_RESUMING = (401, 403, 404, 429, 503, 504)
_GENERATING = (401, 403, 404, 408, 413, 415, 429, 503, 504)

_HEADERS: Mapping[str, Json] = {
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

_NOT_SUPPORTED = "Part of OpenAI's API and not supported yet: only values without an effect are accepted."


class Generating(NamedTuple):
    """An endpoint that generates; `has_events`: its stream's events have names, and no `[DONE]` comes last."""

    path: str
    operation_id: str
    summary: str
    body: Any
    completed: Any
    chunk: Any
    neutral: Mapping[str, tuple[Any, ...]]
    only_with: Mapping[str, str]
    example: Json
    has_events: bool = False


GENERATING = (
    Generating(
        "/chat/completions",
        "createChatCompletion",
        "Answer a conversation",
        chat_request.ChatBody,
        ChatCompletion,
        ChatCompletionChunk,
        chat_request.NEUTRAL,
        chat_request.ONLY_WITH,
        {"messages": [{"role": "user", "content": "What is the capital of France?"}]},
    ),
    Generating(
        "/completions",
        "createCompletion",
        "Continue a text",
        completion_request.CompletionBody,
        Completion,
        CompletionChunk,
        completion_request.NEUTRAL,
        completion_request.ONLY_WITH,
        {"prompt": "The capital of France is"},
    ),
    Generating(
        "/responses",
        "createResponse",
        "Answer a conversation of items",
        response_request.ResponsesBody,
        ResponseObject,
        ResponseEvent,
        response_request.NEUTRAL,
        response_request.ONLY_WITH,
        {"input": "What is the capital of France?"},
        has_events=True,
    ),
)
_TOKENIZE_BODIES = (tokenize_request.TokenizeTextBody, tokenize_request.TokenizeChatBody)
_OTHER_TYPES = (
    *responses.TYPES,
    *_TOKENIZE_BODIES,
    tokenize_request.DetokenizeBody,
    TokenizeResponse,
    DetokenizeResponse,
    models.ModelList,
    models.ModelObject,
    health.Alive,
    health.Unready,
    health.HealthReport,
    about.About,
    ErrorBody,
)


_NOT_BOTH_ENDS: Json = {
    "not": {
        "properties": {"add_generation_prompt": {"const": True}, "continue_final_message": {"const": True}},
        "required": ["add_generation_prompt", "continue_final_message"],
    }
}


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
        "paths": _paths(),
        "components": {
            "schemas": _schemas(settings),
            "responses": {str(status): _error(status) for status in _STATUSES}
            | anthropic.responses(_STATUSES, _ref(ErrorBody)),
            "headers": _HEADERS,
            "parameters": _parameters(settings),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
            },
        },
    }


def _schemas(settings: Settings) -> Json:
    types = [t for endpoint in GENERATING for t in (endpoint.body, endpoint.completed, endpoint.chunk)]
    _, schemas = msgspec.json.schema_components([*types, *_OTHER_TYPES], ref_template=_REF)
    chat = (tokenize_request.TokenizeChatBody, chat_request.NEUTRAL, chat_request.ONLY_WITH)
    bodies = [(endpoint.body, endpoint.neutral, endpoint.only_with) for endpoint in GENERATING]
    for body, neutral, only_with in [*bodies, chat]:
        schema = schemas[body.__name__]
        for name, values in neutral.items():
            schema["properties"][name] = _neutral(schema["properties"][name], values)
        if only_with:
            schema["allOf"] = [_only_with(name, other) for name, other in only_with.items()]
    schemas["TokenizeChatBody"]["allOf"].append(_NOT_BOTH_ENDS)
    schemas["TokenizeTextBody"]["properties"]["messages"] = False
    schemas["TokenizeChatBody"]["properties"]["prompt"] = False
    for body in (
        *(each for each, _, _ in [*bodies, chat]),
        tokenize_request.TokenizeTextBody,
        tokenize_request.DetokenizeBody,
    ):
        if settings.strict_parameters:
            schemas[body.__name__]["additionalProperties"] = False
    for schema in schemas.values():
        if schema.get("required") == []:
            del schema["required"]
    schemas |= anthropic.schemas(is_strict=settings.strict_parameters)
    _use_ecma_patterns(schemas)
    return schemas


def _use_ecma_patterns(schema: Any) -> None:
    r"""JSON Schema's expressions end with `$`; Python's with `\Z`, which is an error for clients in JavaScript."""
    if isinstance(schema, dict) and isinstance(pattern := schema.get("pattern"), str):
        schema["pattern"] = re.sub(r"\\Z$", "$", pattern)
    for value in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        _use_ecma_patterns(value)


def _neutral(schema: Json, values: tuple[Any, ...]) -> Json:
    """A field with only the values without an effect."""
    plain = [msgspec.to_builtins(value) for value in values]
    objects = [value for value in plain if isinstance(value, dict)]
    if not objects:
        return {"description": _NOT_SUPPORTED, "enum": [*plain, None], "default": None}
    # Objects may have unknown fields.
    consts = [
        {"properties": {key: {"const": value} for key, value in fields.items()}, "required": list(fields)}
        for fields in objects
    ]
    return schema | {"description": _NOT_SUPPORTED, "allOf": [{"anyOf": [{"type": "null"}, *consts]}]}


def _only_with(name: str, other: str) -> Json:
    """`name` may ask for something only if `other` is true."""
    return {
        "anyOf": [
            {"properties": {name: {"enum": [None, 0]}}},
            {"properties": {other: {"enum": [True, 1]}}, "required": [other]},
        ]
    }


def _ref(kind: Any) -> Json:
    return {"$ref": _REF.format(name=kind.__name__)}


def _error(status: int) -> Json:
    names = ["X-Request-Id"]
    if status in (_TOO_MANY_REQUESTS, _UNAVAILABLE, _CONFLICT):
        names.append("Retry-After")
    if status == _NOT_ALLOWED:
        names.append("Allow")
    return _response(_STATUSES[status], ErrorBody, [*names, "X-Should-Retry"])


def _response(description: str, kind: Any, headers: Sequence[str] = ("X-Request-Id",)) -> Json:
    return {
        "description": description,
        "headers": _headers(headers),
        "content": {_JSON: {"schema": _ref(kind)}},
    }


def _headers(names: Sequence[str]) -> Json:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _responses(ok: Json, statuses: Sequence[int]) -> Json:
    """All responses by status; `ok` are those that only this endpoint has."""
    errors = {str(status): {"$ref": f"#/components/responses/{status}"} for status in [*_ALWAYS, *statuses]}
    return dict(sorted((errors | ok).items()))


def _parameters(settings: Settings) -> Json:
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
        **responses.parameters(),
    }


def _paths() -> Json:
    paths: Json = {}
    for prefix in PREFIXES:
        suffix = "" if prefix else "Unversioned"
        for endpoint in GENERATING:
            paths[prefix + endpoint.path] = {"post": _generating(endpoint, suffix)}
        paths |= _tokenizing(prefix, suffix)
        common = {
            "parameters": [_parameter(name) for name in ("RequestId", "RequestTimeout", "Resumable")],
            "security": _security(),
            "responses": _responses({}, _GENERATING),
        }
        paths |= anthropic.paths(prefix, suffix, common)
        looking_up = {
            "parameters": [_parameter("RequestId")],
            "security": _security(),
            "responses": _responses({}, _STORED),
        }
        counting = looking_up | {"responses": _responses({}, (*_TOKENIZING, _CONFLICT))}
        paths |= responses.paths(prefix, suffix, looking_up, counting)
        paths[prefix + STREAM_PATH] = _resuming(suffix)
        listed = {"200": _response("The models that can be used now.", models.ModelList)}
        listed["200"]["links"] = {
            "first": {
                "operationId": f"retrieveModel{suffix}",
                "parameters": {"model_id": "$response.body#/data/0/id"},
            }
        }
        paths[f"{prefix}/models"] = _reading(
            f"listModels{suffix}", "List the models", "Models", _responses(listed, _LISTING), is_open=False
        )
        one = {"200": _response("The model.", models.ModelObject)}
        paths[prefix + MODEL_PATH] = {"parameters": [_parameter("ModelId")]} | _reading(
            f"retrieveModel{suffix}", "Look up a model", "Models", _responses(one, _ONE_MODEL), is_open=False
        )
        anthropic.add_models(paths[f"{prefix}/models"], is_list=True)
        anthropic.add_models(paths[prefix + MODEL_PATH], is_list=False)
    alive = {"200": _response("The process runs.", health.Alive)}
    ready = {
        "200": _response("Redis answers, and a model has a worker.", health.Alive),
        "503": _response("Requests would fail.", health.Unready, ("X-Request-Id", "Retry-After")),
    }
    report = {"200": _response("The process runs.", health.HealthReport)}
    for path, summary, ok in (
        ("livez", "Whether the process runs", alive),
        ("readyz", "Whether requests can be served", ready),
        ("health", "What the process sees", report),
    ):
        paths[f"/{path}"] = _reading(path, summary, "Health", _responses(ok, ()), is_open=True)
    for path in about.PATHS:
        ok = {"200": _response("The name, the version and the endpoints.", about.About)}
        name = "about" + path.replace("/", "").title()
        paths[path] = _reading(name, "What answers here", "Description", _responses(ok, _OPEN), is_open=True)
    paths[PATH] = _reading("describe", "This description", "Description", _described(), is_open=True)
    return paths


def _described() -> Json:
    headers = _headers(("X-Request-Id", "ETag"))
    return _responses(
        {
            "200": {
                "description": "An OpenAPI description.",
                "headers": headers,
                "content": {_JSON: {"schema": {"type": "object"}}},
            },
            "304": {"description": "It has the ETag that `If-None-Match` lists.", "headers": headers},
        },
        (403,),
    )


def _reading(operation_id: str, summary: str, tag: str, responses: Json, *, is_open: bool) -> Json:
    """GET, and HEAD, which is the same without a body."""
    get: Json = {
        "operationId": operation_id,
        "summary": summary,
        "tags": [tag],
        "parameters": [_parameter("RequestId")],
        "responses": responses,
    }
    if not is_open:
        get["security"] = _security()
    bare = {status: _without_content(status, response) for status, response in responses.items()}
    return {"get": get, "head": get | {"operationId": f"{operation_id}Head", "responses": bare}}


def _without_content(status: str, response: Json) -> Json:
    full = response if "$ref" not in response else _error(int(status))
    return {name: value for name, value in full.items() if name != "content"}


def _generating(endpoint: Generating, suffix: str) -> Json:
    data = {
        "type": "string",
        "contentMediaType": _JSON,
        "contentSchema": {"anyOf": [_ref(endpoint.chunk), _ref(ErrorBody)]},
    }
    frame_id = {"type": "string", "description": "Of the frame; `Last-Event-ID` takes it."}
    event: Json = {
        "description": "With `stream`: one event of the stream. An error, or `[DONE]`, is the last one.",
        "type": "object",
        "properties": {"data": {"anyOf": [data, {"const": "[DONE]"}]}, "id": frame_id},
        "required": ["data"],
    }
    if endpoint.has_events:
        event |= {
            "description": "With `stream`: one event of the stream, whose type is also its name.",
            "properties": {"event": {"type": "string"}, "data": data, "id": frame_id},
            "required": ["event", "data"],
        }
    headers = ("X-Request-Id", "X-Ignored-Parameters", "X-Stream-Id")
    ok = _response("The answer.", endpoint.completed, headers)
    ok["content"]["text/event-stream"] = {"schema": event}
    return {
        "operationId": endpoint.operation_id + suffix,
        "summary": endpoint.summary,
        "tags": ["Generation"],
        "parameters": [_parameter(name) for name in ("RequestId", "RequestTimeout", "Resumable")],
        "requestBody": {
            "required": True,
            "content": {
                _JSON: {"schema": _ref(endpoint.body), "examples": {"plain": {"value": endpoint.example}}}
            },
        },
        "responses": _responses(
            {"200": ok}, (*_GENERATING, _CONFLICT) if endpoint.has_events else _GENERATING
        ),
        "security": _security(),
    }


def _resuming(suffix: str) -> Json:
    headers = _headers(("X-Request-Id", "X-Stream-Id"))
    event = {"description": "The events of the stream.", "type": "object"}
    ok = {"description": "The rest of the stream.", "headers": headers}
    ok["content"] = {"text/event-stream": {"schema": event}}
    return {
        "parameters": [_parameter("StreamId")],
        "get": {
            "operationId": "resumeStream" + suffix,
            "summary": "Continue a resumable stream",
            "tags": ["Generation"],
            "parameters": [_parameter(name) for name in ("RequestId", "LastEventId", "StartingAfter")],
            "responses": _responses({"200": ok}, _RESUMING),
            "security": _security(),
        },
    }


def _tokenizing(prefix: str, suffix: str) -> Json:
    tokenize = _response("The tokens.", TokenizeResponse, ("X-Request-Id", "X-Ignored-Parameters"))
    detokenize = _response("The text.", DetokenizeResponse, ("X-Request-Id", "X-Ignored-Parameters"))
    return {
        f"{prefix}{path}": {
            "post": {
                "operationId": name + suffix,
                "summary": summary,
                "tags": ["Tokens"],
                "parameters": [_parameter("RequestId")],
                "requestBody": {"required": True, "content": {_JSON: {"schema": body, "examples": examples}}},
                "responses": _responses({"200": ok}, _TOKENIZING),
                "security": _security(),
            }
        }
        for path, name, summary, body, ok, examples in (
            (
                "/tokenize",
                "tokenize",
                "Convert text or messages to tokens",
                {"anyOf": [_ref(body) for body in _TOKENIZE_BODIES]},
                tokenize,
                {"plain": {"value": {"prompt": "The capital of France is"}}},
            ),
            (
                "/detokenize",
                "detokenize",
                "Convert tokens to text",
                _ref(tokenize_request.DetokenizeBody),
                detokenize,
                {"plain": {"value": {"tokens": [1, 2, 3]}}},
            ),
        )
    }


def _parameter(name: str) -> Json:
    return {"$ref": f"#/components/parameters/{name}"}


def _security() -> list[Json]:
    """A key, or none where the server asks for none."""
    return [{"bearer": []}, {"key": []}, {}]
