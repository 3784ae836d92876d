"""`/v1/messages`: calls, stops, counts and the events of a stream. Checks depend on required calls, not on what a model likes to say."""

from __future__ import annotations

import json
from typing import Any

import jsonschema

from tests.conformance.server import ANTHROPIC_VERSION, MESSAGES, Answer, NotShown, Server, require

_MAX_TOKENS = 60
_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
_TOOLS = [{"name": name, "description": "It.", "input_schema": _SCHEMA} for name in ("get_sky", "set_lamp")]
_CALL: dict[str, Any] = {
    "max_tokens": _MAX_TOKENS,
    "tools": _TOOLS,
    "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
}
_SHORT = 5


def _block(answer: Answer, kind: str) -> Any:
    require(answer.status == 200, f"status {answer.status}: {answer.body[:80]!r}")
    for block in answer.json["content"]:
        if block["type"] == kind:
            return block
    raise NotShown(f"there is no {kind}: {[block['type'] for block in answer.json['content']]}")


def _validate(value: Any) -> None:
    try:
        jsonschema.validate(value, _SCHEMA)
    except jsonschema.ValidationError as error:
        raise NotShown(f"{str(value)[:50]}: {error.message[:60]}") from None


def _stream(server: Server, **fields: Any) -> list[Any]:
    return server.once(MESSAGES, stream=True, **{"max_tokens": _SHORT} | fields).events


def _of_type(events: list[Any], kind: str) -> list[Any]:
    return [event for event in events if event["type"] == kind]


def counted(server: Server) -> None:
    usage = server.post(MESSAGES, {}).json["usage"]
    read = usage.get("cache_read_input_tokens", 0) + usage.get("cache_creation_input_tokens", 0)
    total = usage["input_tokens"] + read
    answer = server.post(f"{MESSAGES}/count_tokens", {"max_tokens": None})
    require(answer.status == 200, f"status {answer.status}: {answer.body[:60]!r}")
    count = answer.json["input_tokens"]
    require(count == total, f"it counts {count}, usage has {total}")


def models(server: Server) -> None:
    answer = server.ask("GET", "/v1/models", None, {"anthropic-version": ANTHROPIC_VERSION})
    listed = answer.json
    require(isinstance(listed.get("has_more"), bool), "there is no has_more")
    require(listed["data"], "there are no models")
    for model in listed["data"]:
        require(model.get("type") == "model", f"the type is {model.get('type')!r}")
        require(isinstance(model.get("display_name"), str), "there is no display_name")


def any_tool(server: Server) -> None:
    name = _block(server.once(MESSAGES, **_CALL), "tool_use")["name"]
    require(name in ("get_sky", "set_lamp"), f"it calls {name!r}")


def valid_input(server: Server) -> None:
    _validate(_block(server.once(MESSAGES, **_CALL), "tool_use")["input"])


def tool_stop(server: Server) -> None:
    answer = server.once(MESSAGES, **_CALL)
    reason, call = answer.json["stop_reason"], _block(answer, "tool_use")
    require(reason == "tool_use", f"the stop reason is {reason!r}")
    require(call["id"].startswith("toolu_"), f"the id is {call['id']!r}")


def named_tool(server: Server) -> None:
    answer = server.once(MESSAGES, **_CALL | {"tool_choice": {"type": "tool", "name": "set_lamp"}})
    name = _block(answer, "tool_use")["name"]
    require(name == "set_lamp", f"it calls {name!r}")


def no_tool(server: Server) -> None:
    _block(server.once(MESSAGES, **_CALL | {"tool_choice": {"type": "none"}, "max_tokens": 3}), "text")


def stop_sequence(server: Server) -> None:
    text = _block(server.once(MESSAGES, max_tokens=12), "text")["text"]
    stop = text[len(text) // 2 :][:3]
    if not stop:
        raise NotShown("the model says too little")
    answer = server.post(MESSAGES, {"max_tokens": 12, "stop_sequences": [stop]}).json
    found = (answer["stop_reason"], answer["stop_sequence"])
    require(found == ("stop_sequence", stop), f"it stops with {found}")
    got = "".join(block["text"] for block in answer["content"])
    require(got == text[: text.index(stop)], f"the text is {got!r}, of {text!r} before {stop!r}")


def json_schema(server: Server) -> None:
    config = {"format": {"type": "json_schema", "schema": _SCHEMA}}
    text = _block(server.post(MESSAGES, {"max_tokens": _MAX_TOKENS, "output_config": config}), "text")["text"]
    try:
        _validate(json.loads(text))
    except ValueError:
        raise NotShown(f"{text[:50]!r} is no JSON") from None


def order(server: Server) -> None:
    names = [event["type"] for event in _stream(server) if event["type"] != "ping"]
    middle = [name for name in names if name != "content_block_delta"]
    wanted = ["message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"]
    require(middle == wanted, f"they are {middle}")
    inside = names[2 : 2 + names.count("content_block_delta")]
    require(inside and set(inside) == {"content_block_delta"}, f"they are {names}")


def start(server: Server) -> None:
    message = _stream(server)[0]["message"]
    require(message["content"] == [] and message["stop_reason"] is None, f"it is {str(message)[:60]}")
    require(message["usage"]["input_tokens"] >= 0, "it has no input tokens")
    total = message["usage"]["input_tokens"] + message["usage"].get("cache_read_input_tokens", 0)
    require(total > 0, "it has no input tokens")


def same_text(server: Server) -> None:
    deltas = _of_type(_stream(server), "content_block_delta")
    kinds = {event["delta"]["type"] for event in deltas}
    require(kinds == {"text_delta"}, f"the deltas are {kinds}")
    text = "".join(event["delta"]["text"] for event in deltas)
    plain = _block(server.once(MESSAGES, max_tokens=_SHORT), "text")["text"]
    require(text == plain, f"the stream is {text!r}, not {plain!r}")


def message_delta(server: Server) -> None:
    found = _of_type(_stream(server), "message_delta")
    require(len(found) == 1, f"there are {len(found)}")
    plain = server.once(MESSAGES, max_tokens=_SHORT).json
    reason, count = found[0]["delta"]["stop_reason"], found[0]["usage"]["output_tokens"]
    wanted = (plain["stop_reason"], plain["usage"]["output_tokens"])
    require((reason, count) == wanted, f"they are {reason!r} and {count}, not {wanted}")


def streamed_call(server: Server) -> None:
    events = _stream(server, **_CALL)
    started = [
        each
        for each in _of_type(events, "content_block_start")
        if each["content_block"]["type"] == "tool_use"
    ]
    require(len(started) == 1, f"{len(started)} calls are started")
    require(started[0]["content_block"]["input"] == {}, "the call starts with an input")
    deltas = [
        each["delta"]
        for each in _of_type(events, "content_block_delta")
        if each["index"] == started[0]["index"]
    ]
    require({each["type"] for each in deltas} == {"input_json_delta"}, "other deltas are in the call")
    text = "".join(each["partial_json"] for each in deltas)
    try:
        _validate(json.loads(text))
    except ValueError:
        raise NotShown(f"the input is {text[:50]!r}") from None


def ping(server: Server) -> None:
    require(_of_type(_stream(server), "ping"), "there is no ping")


def indices(server: Server) -> None:
    for fields in ({}, _CALL):
        events = _stream(server, **fields)
        started = [event["index"] for event in _of_type(events, "content_block_start")]
        stopped = [event["index"] for event in _of_type(events, "content_block_stop")]
        require(started == stopped == [*range(len(started))], f"they are {started} and {stopped}")
