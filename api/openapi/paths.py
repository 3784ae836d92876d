"""The paths and their operations; each endpoint has a function here, or its protocol describes it.

Called by `api.openapi.document`. Must not know the types of fields, which msgspec describes.
"""

from __future__ import annotations

from api import about, health
from api.anthropic import description as anthropic
from api.openai import models
from api.openai.responses import description as stored
from api.openai.tokenize import request as tokenize_request
from api.openai.tokenize.resources import DetokenizeResponse, TokenizeResponse
from api.openapi.components import (
    CONFLICT,
    GENERATING_STATUSES,
    JSON,
    Json,
    error_response,
    headers_of,
    parameter,
    ref,
    response,
    responses_of,
    security,
)
from api.openapi.generating import GENERATING, generating_path
from api.openapi.schemas import TOKENIZE_BODIES

PATH = "/openapi.json"
PREFIXES = ("/v1", "")
MODEL_PATH = "/models/{model_id}"
STREAM_PATH = "/streams/{stream_id}"

_STORED = (401, 403, 404, 503)
_OPEN = (403,)
_LISTING = (401, 403, 503)
_ONE_MODEL = (401, 403, 404, 503)
_TOKENIZING = (401, 403, 404, 408, 413, 415, 503)
_RESUMING = (401, 403, 404, 429, 503, 504)


def paths() -> Json:
    """All paths, each also without `/v1`, where operations have other ids."""
    described: Json = {}
    for prefix in PREFIXES:
        suffix = "" if prefix else "Unversioned"
        for endpoint in GENERATING:
            described[prefix + endpoint.path] = {"post": generating_path(endpoint, suffix)}
        described |= _tokenizing(prefix, suffix)
        common = {
            "parameters": [parameter(name) for name in ("RequestId", "RequestTimeout", "Resumable")],
            "security": security(),
            "responses": responses_of({}, GENERATING_STATUSES),
        }
        described |= anthropic.paths(prefix, suffix, common)
        looking_up = {
            "parameters": [parameter("RequestId")],
            "security": security(),
            "responses": responses_of({}, _STORED),
        }
        counting = looking_up | {"responses": responses_of({}, (*_TOKENIZING, CONFLICT))}
        described |= stored.paths(prefix, suffix, looking_up, counting)
        described[prefix + STREAM_PATH] = _resuming(suffix)
        described |= _models(prefix, suffix)
    return described | _health() | _about()


def _models(prefix: str, suffix: str) -> Json:
    """The list of models and one model, in the form of either protocol."""
    listed = {"200": response("The models that can be used now.", models.ModelList)}
    listed["200"]["links"] = {
        "first": {
            "operationId": f"retrieveModel{suffix}",
            "parameters": {"model_id": "$response.body#/data/0/id"},
        }
    }
    all_models = _reading(
        f"listModels{suffix}", "List the models", "Models", responses_of(listed, _LISTING), is_open=False
    )
    one = {"200": response("The model.", models.ModelObject)}
    one_model = {"parameters": [parameter("ModelId")]} | _reading(
        f"retrieveModel{suffix}", "Look up a model", "Models", responses_of(one, _ONE_MODEL), is_open=False
    )
    anthropic.add_models(all_models, is_list=True)
    anthropic.add_models(one_model, is_list=False)
    return {f"{prefix}/models": all_models, prefix + MODEL_PATH: one_model}


def _health() -> Json:
    """What load balancers and operators ask; these paths need no key and have no `/v1`."""
    alive = {"200": response("The process runs.", health.Alive)}
    ready = {
        "200": response("Redis answers, and a model has a worker.", health.Alive),
        "503": response("Requests would fail.", health.Unready, ("X-Request-Id", "Retry-After")),
    }
    report = {"200": response("The process runs.", health.HealthReport)}
    return {
        f"/{path}": _reading(path, summary, "Health", responses_of(ok, ()), is_open=True)
        for path, summary, ok in (
            ("livez", "Whether the process runs", alive),
            ("readyz", "Whether requests can be served", ready),
            ("health", "What the process sees", report),
        )
    }


def _about() -> Json:
    """The server's name, and this description."""
    ok = {"200": response("The name, the version and the endpoints.", about.About)}
    described = {
        path: _reading(
            "about" + path.replace("/", "").title(),
            "What answers here",
            "Description",
            responses_of(ok, _OPEN),
            is_open=True,
        )
        for path in about.PATHS
    }
    own = _reading("describe", "This description", "Description", _described(), is_open=True)
    return described | {PATH: own}


def _described() -> Json:
    headers = headers_of(("X-Request-Id", "ETag"))
    return responses_of(
        {
            "200": {
                "description": "An OpenAPI description.",
                "headers": headers,
                "content": {JSON: {"schema": {"type": "object"}}},
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
        "parameters": [parameter("RequestId")],
        "responses": responses,
    }
    if not is_open:
        get["security"] = security()
    bare = {status: _without_content(status, response) for status, response in responses.items()}
    return {"get": get, "head": get | {"operationId": f"{operation_id}Head", "responses": bare}}


def _without_content(status: str, response: Json) -> Json:
    full = response if "$ref" not in response else error_response(int(status))
    return {name: value for name, value in full.items() if name != "content"}


def _resuming(suffix: str) -> Json:
    headers = headers_of(("X-Request-Id", "X-Stream-Id"))
    event = {"description": "The events of the stream.", "type": "object"}
    ok = {"description": "The rest of the stream.", "headers": headers}
    ok["content"] = {"text/event-stream": {"schema": event}}
    return {
        "parameters": [parameter("StreamId")],
        "get": {
            "operationId": "resumeStream" + suffix,
            "summary": "Continue a resumable stream",
            "tags": ["Generation"],
            "parameters": [parameter(name) for name in ("RequestId", "LastEventId", "StartingAfter")],
            "responses": responses_of({"200": ok}, _RESUMING),
            "security": security(),
        },
    }


def _tokenizing(prefix: str, suffix: str) -> Json:
    tokenize = response("The tokens.", TokenizeResponse, ("X-Request-Id", "X-Ignored-Parameters"))
    detokenize = response("The text.", DetokenizeResponse, ("X-Request-Id", "X-Ignored-Parameters"))
    return {
        f"{prefix}{path}": {
            "post": {
                "operationId": name + suffix,
                "summary": summary,
                "tags": ["Tokens"],
                "parameters": [parameter("RequestId")],
                "requestBody": {"required": True, "content": {JSON: {"schema": body, "examples": examples}}},
                "responses": responses_of({"200": ok}, _TOKENIZING),
                "security": security(),
            }
        }
        for path, name, summary, body, ok, examples in (
            (
                "/tokenize",
                "tokenize",
                "Convert text or messages to tokens",
                {"anyOf": [ref(body) for body in TOKENIZE_BODIES]},
                tokenize,
                {"plain": {"value": {"prompt": "The capital of France is"}}},
            ),
            (
                "/detokenize",
                "detokenize",
                "Convert tokens to text",
                ref(tokenize_request.DetokenizeBody),
                detokenize,
                {"plain": {"value": {"tokens": [1, 2, 3]}}},
            ),
        )
    }
