"""The part of `/openapi.json` that describes the endpoints of stored responses; `api.openapi` adds it to the rest."""

from __future__ import annotations

from typing import Any

from api.openai.responses.answer_types import ResponseEvent, ResponseObject
from api.openai.responses.request import THOUGHTS, ResponsesBody
from api.openai.responses.stored.input_tokens import InputTokensObject
from api.openai.responses.stored.pages import DEFAULT_LIMIT, MAX_LIMIT, ItemList
from api.openai.responses.stored.resources import DeletedResponse

Json = dict[str, Any]

PATH = "/responses"
TYPES = (ResponseObject, ResponseEvent, ItemList, DeletedResponse, InputTokensObject)

_REF = "#/components/schemas/{name}"
_JSON = "application/json"
_TAG = "Stored responses"


def parameters() -> Json:
    """Components for parameters, by name."""
    return {
        "ResponseId": {
            "name": "response_id",
            "in": "path",
            "required": True,
            "description": "Of a response of the same API key that is still stored.",
            "schema": {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,80}$"},
        }
    }


def paths(prefix: str, suffix: str, common: Json, posting: Json) -> Json:
    """The paths of stored responses.

    Args:
        suffix: Of operation ids.
        common: Parameters, security and error responses of all operations without a body.
        posting: The same of those with one.
    """
    path = f"{prefix}{PATH}/{{response_id}}"
    ids = [{"$ref": "#/components/parameters/ResponseId"}]
    return {
        f"{prefix}{PATH}/input_tokens": {"post": _input_tokens(suffix, posting)},
        path: {
            "parameters": ids,
            "get": _operation(
                "retrieveResponse" + suffix, "Read a response, or stream it again", common, _retrieved()
            )
            | {"parameters": [*common["parameters"], *_query_of_get()]},
            "delete": _operation(
                "deleteResponse" + suffix,
                "Delete a response; a running one is cancelled",
                common,
                _json(DeletedResponse),
            ),
        },
        f"{path}/cancel": {
            "parameters": ids,
            "post": _operation(
                "cancelResponse" + suffix,
                "Cancel a response in the background",
                common,
                _json(ResponseObject),
            ),
        },
        f"{path}/input_items": {
            "parameters": ids,
            "get": _operation(
                "listInputItems" + suffix, "List what a response was generated from", common, _json(ItemList)
            )
            | {"parameters": [*common["parameters"], *_query_of_items()]},
        },
    }


def _operation(operation_id: str, summary: str, common: Json, content: Json) -> Json:
    return {
        "operationId": operation_id,
        "summary": summary,
        "tags": [_TAG],
        "parameters": common["parameters"],
        "security": common["security"],
        "responses": {"200": _ok(content)} | common["responses"],
    }


def _ok(content: Json, *headers: str) -> Json:
    names = ("X-Request-Id", *headers)
    return {
        "description": "As the summary says.",
        "headers": {name: {"$ref": f"#/components/headers/{name}"} for name in names},
        "content": content,
    }


def _json(kind: Any) -> Json:
    return {_JSON: {"schema": {"$ref": _REF.format(name=kind.__name__)}}}


def _retrieved() -> Json:
    data = {
        "type": "string",
        "contentMediaType": _JSON,
        "contentSchema": {"$ref": _REF.format(name=ResponseEvent.__name__)},
    }
    event = {
        "description": "With `stream=true`: one event of the stream.",
        "type": "object",
        "properties": {"event": {"type": "string"}, "data": data, "id": {"type": "string"}},
        "required": ["event", "data"],
    }
    return _json(ResponseObject) | {"text/event-stream": {"schema": event}}


def _input_tokens(suffix: str, posting: Json) -> Json:
    body = {"schema": {"$ref": _REF.format(name=ResponsesBody.__name__)}}
    examples = {"plain": {"value": {"input": "What is the capital of France?"}}}
    operation = _operation(
        "countInputTokens" + suffix,
        "Count the tokens of a request's input",
        posting,
        _json(InputTokensObject),
    )
    operation["responses"]["200"] = _ok(_json(InputTokensObject), "X-Ignored-Parameters")
    return operation | {"requestBody": {"required": True, "content": {_JSON: body | {"examples": examples}}}}


def _query(name: str, schema: Json, description: str) -> Json:
    return {"name": name, "in": "query", "description": description, "schema": schema}


def _query_of_get() -> list[Json]:
    return [
        _query("stream", {"type": "boolean"}, "Whether the events are streamed again."),
        _query(
            "starting_after",
            {"type": "integer", "minimum": 0, "maximum": 999_999_999},
            "With `stream=true`: the `sequence_number` of the last event that is known.",
        ),
        _query(
            "include[]",
            {"type": "array", "items": {"type": "string"}},
            f"`{THOUGHTS}` adds the reasoning in encoded form; other values have no effect.",
        ),
    ]


def _query_of_items() -> list[Json]:
    return [
        _query(
            "limit",
            {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT},
            "Items of a page.",
        ),
        _query("order", {"enum": ["asc", "desc"], "default": "desc"}, "`asc`: the oldest item first."),
        _query("after", {"type": "string"}, "The id of the last item of the page before."),
    ]
