"""The part of `/openapi.json` that describes Anthropic's protocol; `api.openapi` adds it to the rest.

Generated from the types that parse requests and those of answers. Names of components begin with `Anthropic`, since both protocols
have messages, tools and errors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from api.anthropic.answer_types import AnswerMessage, StreamEvent
from api.anthropic.count_tokens import TokenCount
from api.anthropic.errors import OVERLOADED, ErrorBody, ErrorEvent
from api.anthropic.messages.request import MessagesBody
from api.anthropic.models import MAX_LIMIT, ModelInfo, ModelPage

Json = dict[str, Any]

_PREFIX = "Anthropic"
_REF = f"#/components/schemas/{_PREFIX}{{name}}"
_JSON = "application/json"
_TAG = "Anthropic"
_OVERLOADED_TEXT = "The pool is full, or has no worker or no Redis now; `Retry-After` says when to try again."
_REPLACED = ("429", "503")
"""Statuses that other protocols have where this one has 529."""

_EXAMPLE = {"max_tokens": 100, "messages": [{"role": "user", "content": "What is the capital of France?"}]}


def schemas(*, is_strict: bool) -> Json:
    """The schemas of all types, by name.

    Args:
        is_strict: Whether unknown fields are refused.
    """
    types = [
        MessagesBody,
        AnswerMessage,
        StreamEvent,
        ErrorBody,
        ErrorEvent,
        TokenCount,
        ModelInfo,
        ModelPage,
    ]
    _, found = msgspec.json.schema_components(types, ref_template=_REF)
    if is_strict:
        found["MessagesBody"]["additionalProperties"] = False
    return {_PREFIX + re.sub(r"[^A-Za-z0-9_]", "_", name): schema for name, schema in found.items()}


def responses(statuses: Mapping[int, str], either: Json) -> Json:
    """The error responses, by name: this protocol's, and those of the models, which have either protocol's form.

    Args:
        statuses: What each status means.
        either: The other protocol's schema of an error body.
    """
    own = {
        f"{_PREFIX}{status}": _error(text, _ref(ErrorBody), *_more_headers(status))
        for status, text in statuses.items()
        if str(status) not in _REPLACED
    }
    both = {"anyOf": [either, _ref(ErrorBody)]}
    own[f"{_PREFIX}{OVERLOADED}"] = _error(_OVERLOADED_TEXT, _ref(ErrorBody), "Retry-After")
    return own | {
        f"Either{status}": _error(text, both, *_more_headers(status)) for status, text in statuses.items()
    }


def parameters() -> Json:
    """Components for parameters, by name."""
    return {
        "AnthropicVersion": {
            "name": "Anthropic-Version",
            "in": "header",
            "description": "Selects Anthropic's form of the response where a path has two. Every version is served as 2023-06-01.",
            "schema": {"type": "string", "examples": ["2023-06-01"]},
        },
        "AnthropicLimit": _query("limit", {"type": "string", "examples": ["20", str(MAX_LIMIT)]}),
        "AnthropicAfterId": _query("after_id", {"type": "string"}),
        "AnthropicBeforeId": _query("before_id", {"type": "string"}),
    }


def paths(prefix: str, suffix: str, common: Json) -> Json:
    """The paths that only this protocol has.

    Args:
        prefix: Of the paths.
        suffix: Of the names of operations.
        common: Of each operation: `parameters`, the first of which counting tokens has too, `security`, and the statuses as `responses`.
    """
    refs = {
        status: {"$ref": f"#/components/responses/{_PREFIX}{status}"}
        for status in common["responses"]
        if status not in _REPLACED
    }
    refs[str(OVERLOADED)] = {"$ref": f"#/components/responses/{_PREFIX}{OVERLOADED}"}
    message = _response("The answer.", _ref(AnswerMessage))
    message["content"]["text/event-stream"] = {"schema": _stream_event()}
    body = {
        "required": True,
        "content": {_JSON: {"schema": _ref(MessagesBody), "examples": {"plain": {"value": _EXAMPLE}}}},
    }
    operations = {
        f"{prefix}/messages": ("createMessage", "Answer a conversation", message),
        f"{prefix}/messages/count_tokens": (
            "countMessageTokens",
            "Count the tokens of a prompt",
            _response("The tokens.", _ref(TokenCount)),
        ),
    }
    return {
        path: {
            "post": {
                "operationId": name + suffix,
                "summary": summary,
                "tags": [_TAG],
                "parameters": common["parameters"] if ok is message else common["parameters"][:1],
                "requestBody": body,
                "responses": dict(sorted((refs | {"200": ok}).items())),
                "security": common["security"],
            }
        }
        for path, (name, summary, ok) in operations.items()
    }


def add_models(item: Json, *, is_list: bool) -> None:
    """Add this protocol's form of the response to the description of a path of the models."""
    names = [
        "AnthropicVersion",
        *(["AnthropicLimit", "AnthropicAfterId", "AnthropicBeforeId"] if is_list else []),
    ]
    for method in ("get", "head"):
        operation = item[method]
        operation["parameters"] = operation["parameters"] + [
            {"$ref": f"#/components/parameters/{name}"} for name in names
        ]
    get = item["get"]
    get["responses"] = {status: _either(response) for status, response in get["responses"].items()}
    if is_list:
        get["responses"]["400"] = {"$ref": "#/components/responses/Either400"}
        item["head"]["responses"]["400"] = {"description": "A query parameter is wrong."}
    overloaded = {"$ref": f"#/components/responses/{_PREFIX}{OVERLOADED}"}
    get["responses"][str(OVERLOADED)] = overloaded
    item["head"]["responses"][str(OVERLOADED)] = {"description": _OVERLOADED_TEXT}
    ok = get["responses"]["200"] = dict(get["responses"]["200"])
    own = _ref(ModelPage if is_list else ModelInfo)
    ok["content"] = {_JSON: {"schema": {"anyOf": [ok["content"][_JSON]["schema"], own]}}}


def _either(response: Json) -> Json:
    if "$ref" not in response:
        return response
    return {"$ref": f"#/components/responses/Either{response['$ref'].rpartition('/')[2]}"}


def _stream_event() -> Json:
    [union] = msgspec.json.schema_components([StreamEvent], ref_template=_REF)[0]
    data = {
        "type": "string",
        "contentMediaType": _JSON,
        "contentSchema": {"anyOf": [union, _ref(ErrorEvent)]},
    }
    return {
        "description": "With `stream`: one event, named by its `type`. `error` or `message_stop` is the last one.",
        "type": "object",
        "properties": {"event": {"type": "string"}, "data": data},
        "required": ["event", "data"],
    }


def _query(name: str, schema: Json) -> Json:
    return {
        "name": name,
        "in": "query",
        "description": "Of Anthropic's form of the list; without effect on the other one.",
        "schema": schema,
    }


def _more_headers(status: int) -> tuple[str, ...]:
    return {405: ("Allow",), 429: ("Retry-After",), 503: ("Retry-After",)}.get(status, ())


def _response(description: str, schema: Json) -> Json:
    return {
        "description": description,
        "headers": _headers("X-Request-Id", "X-Ignored-Parameters"),
        "content": {_JSON: {"schema": schema}},
    }


def _error(description: str, schema: Json, *headers: str) -> Json:
    return {
        "description": description,
        "headers": _headers("X-Request-Id", "X-Should-Retry", *headers),
        "content": {_JSON: {"schema": schema}},
    }


def _headers(*names: str) -> Json:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _ref(kind: Any) -> Json:
    return {"$ref": _REF.format(name=kind.__name__)}
