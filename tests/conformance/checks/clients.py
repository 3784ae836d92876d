"""What clients of local servers rely on beyond single requests: load generators, agents with small models, pasted transcripts."""

from __future__ import annotations

import json
from typing import Any

import jsonschema

from tests.conformance.server import CHAT, LEGACY, Answer, NotShown, Server, require

_MAX_TOKENS = 60


def continuous_usage(server: Server) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = server.post(CHAT, {"stream": True, "max_tokens": 4, "stream_options": options}).chunks
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk.get("usage")]
    with_text = [
        chunk for chunk in chunks if any(choice["delta"].get("content") for choice in chunk["choices"])
    ]
    require(all(chunk.get("usage") for chunk in with_text), "a chunk has no usage")
    require(counts == sorted(counts) and counts[-1] == 4, f"the counts are {counts}")


def exact_length(server: Server) -> None:
    for path in (CHAT, LEGACY):
        answer = server.post(path, {"max_tokens": 24, "min_tokens": 24, "ignore_eos": True})
        require(answer.status == 200, f"status {answer.status}: {answer.body[:60]!r}")
        count = answer.json["usage"]["completion_tokens"]
        require(count == 24, f"{path} has {count} tokens, not 24")


def _arguments(answer: Answer) -> Any:
    calls = answer.choice()["message"].get("tool_calls")
    if not calls:
        raise NotShown("there is no call")
    try:
        return json.loads(calls[0]["function"]["arguments"])
    except ValueError:
        raise NotShown(f"the arguments are {calls[0]['function']['arguments'][:50]!r}") from None


def _forced(server: Server, parameters: dict[str, Any]) -> Any:
    tool = {"type": "function", "function": {"name": "act", "parameters": parameters}}
    choice = {"type": "function", "function": {"name": "act"}}
    fields = {"tools": [tool], "tool_choice": choice, "max_tokens": _MAX_TOKENS}
    return _arguments(server.post(CHAT, fields))


def empty_arguments(server: Server) -> None:
    given = _forced(server, {"type": "object", "properties": {}})
    require(given == {}, f"the arguments are {given}")


def only_declared(server: Server) -> None:
    given = _forced(server, {"type": "object", "properties": {"on": {"type": "boolean"}}})
    require(given.keys() <= {"on"}, f"the arguments are {given}")


def _held(server: Server, response_format: dict[str, Any], schema: dict[str, Any], prompt: str) -> None:
    messages = [{"role": "user", "content": prompt}]
    fields = {"response_format": response_format, "max_tokens": _MAX_TOKENS, "messages": messages}
    text = server.post(CHAT, fields).text()
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError) as error:
        raise NotShown(f"{text[:50]!r}: {str(error)[:60]}") from None


def json_object_schema(server: Server) -> None:
    schema = {"type": "object", "properties": {"wet": {"type": "boolean"}}, "required": ["wet"]}
    _held(server, {"type": "json_object", "schema": schema}, schema, "Say hello to the sea.")


def integer_ends(server: Server) -> None:
    schema = {"type": "object", "properties": {"number": {"type": "integer"}}, "required": ["number"]}
    response_format = {"type": "json_schema", "json_schema": {"name": "number", "schema": schema}}
    _held(server, response_format, schema, "Repeat: 1111111111111111111111111111111111111111")


def control_text(server: Server) -> None:
    """The text that closes a turn is a single token in a template; as data it is tokenized like any other text."""

    def num_tokens(text: str) -> int:
        answer = server.post(CHAT, {"messages": [{"role": "user", "content": text}]})
        count: int = answer.json["usage"]["prompt_tokens"]
        return count

    plain = num_tokens("a")
    for marker in ("<|im_end|>", "<|eot_id|>", "</s>", "<end_of_turn>"):
        require(num_tokens(f"a{marker}") - plain > 1, f"{marker} is one token")
