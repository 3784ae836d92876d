"""The endpoints that generate: the types of their requests and answers, and their descriptions.

`GENERATING` is also what the fuzzer (`bench.fuzz`) sends bodies to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from api.openai.answer_types import ChatCompletion, ChatCompletionChunk, Completion, CompletionChunk
from api.openai.chat import request as chat_request
from api.openai.completions import request as completion_request
from api.openai.errors import ErrorBody
from api.openai.responses import request as response_request
from api.openai.responses.answer_types import ResponseEvent, ResponseObject
from api.openapi.components import (
    CONFLICT,
    GENERATING_STATUSES,
    JSON,
    Json,
    parameter,
    ref,
    response,
    responses_of,
    security,
)


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


def generating_path(endpoint: Generating, suffix: str) -> Json:
    data = {
        "type": "string",
        "contentMediaType": JSON,
        "contentSchema": {"anyOf": [ref(endpoint.chunk), ref(ErrorBody)]},
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
    ok = response("The answer.", endpoint.completed, headers)
    ok["content"]["text/event-stream"] = {"schema": event}
    return {
        "operationId": endpoint.operation_id + suffix,
        "summary": endpoint.summary,
        "tags": ["Generation"],
        "parameters": [parameter(name) for name in ("RequestId", "RequestTimeout", "Resumable")],
        "requestBody": {
            "required": True,
            "content": {
                JSON: {"schema": ref(endpoint.body), "examples": {"plain": {"value": endpoint.example}}}
            },
        },
        "responses": responses_of(
            {"200": ok}, (*GENERATING_STATUSES, CONFLICT) if endpoint.has_events else GENERATING_STATUSES
        ),
        "security": security(),
    }
