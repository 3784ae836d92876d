"""Validates answers against the openai SDK's own types, strictly: no coercion, no missing field.

Called by `server` with every 2xx body that is seen; what was wrong is one behavior of the catalogue.
"""

from __future__ import annotations

import json
from typing import Any

import pydantic
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent

_ROOTS: dict[str, tuple[Any, Any]] = {
    "chat/completions": (ChatCompletion, ChatCompletionChunk),
    "completions": (Completion, Completion),
    "responses": (Response, ResponseStreamEvent),
}


def complaints(path: str, content_type: str, body: bytes) -> list[str]:
    """The violations of a 2xx answer, one line each; none if the SDK has no type for it."""
    root = path.partition("?")[0].strip("/").removeprefix("v1/")
    try:
        if root == "models":
            listed = json.loads(body)
            is_anthropic = "has_more" in listed and "object" not in listed
            return [wrong for item in listed["data"] for wrong in _wrong(Model, item) if not is_anthropic]
        if root.startswith("models/"):
            return _wrong(Model, json.loads(body))
        if root not in _ROOTS:
            return []
        whole, chunk = _ROOTS[root]
        if content_type.startswith("text/event-stream"):
            return [wrong for item in _frames(body) for wrong in _wrong(chunk, _ended(chunk, item))]
        return _wrong(whole, _echoed(whole, json.loads(body)))
    except (ValueError, KeyError, TypeError) as error:
        return [f"{path}: {type(error).__name__} {error}"]


def _frames(body: bytes) -> list[Any]:
    frames = [text[5:].strip() for text in body.decode().split("\n") if text.startswith("data:")]
    found = [json.loads(frame) for frame in frames if frame != "[DONE]"]
    return [item for item in found if "error" not in item]


def _ended(chunk: Any, item: Any) -> Any:
    """Allow the null of OpenAI's own streams in a type that the SDK uses for both streams and answers, without null."""
    if chunk is not Completion:
        return item
    choices = [{**c, "finish_reason": c["finish_reason"] or "stop"} for c in item["choices"]]
    return _echoed(chunk, {**item, "choices": choices})


def _echoed(kind: Any, item: Any) -> Any:
    """Allow the null that OpenAI's own echo has for the prompt's first token, where the type has only numbers."""
    if kind is not Completion:
        return item
    choices = []
    for choice in item["choices"]:
        logprobs = choice.get("logprobs") or {}
        filled = {
            name: [first, *logprobs[name][1:]]
            for name, first in (("token_logprobs", 0.0), ("top_logprobs", {}))
            if logprobs.get(name) and logprobs[name][0] is None
        }
        choices.append(choice | {"logprobs": logprobs | filled} if filled else choice)
    return {**item, "choices": choices}


def _wrong(kind: Any, item: Any) -> list[str]:
    try:
        pydantic.TypeAdapter(kind).validate_json(json.dumps(item), strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = getattr(kind, "__name__", "ResponseStreamEvent")
        return [f"{name}: {'.'.join(map(str, first['loc']))}: {first['msg']}"]
    return []
