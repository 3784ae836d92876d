"""`/v1/responses`: calls, formats and the events of a stream. Checks depend on required calls and formats, not on what a model likes to say."""

from __future__ import annotations

import json
import time
from typing import Any

import jsonschema

from tests.conformance import judge
from tests.conformance.server import RESPONSES, Answer, NotShown, Server, require

_CLOCK_SECONDS = 5
_MAX_TOKENS = 60
_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
_SKY = {"type": "function", "name": "get_sky", "description": "It.", "parameters": _SCHEMA, "strict": True}
_LAMP = {**_SKY, "name": "set_lamp"}
_CUSTOM = {"type": "custom", "name": "run", "description": "Runs a command."}
_CALL: dict[str, Any] = {
    "max_output_tokens": _MAX_TOKENS,
    "tools": [_SKY, _LAMP],
    "tool_choice": "required",
    "parallel_tool_calls": False,
}
_NAMED: dict[str, Any] = _CALL | {"tool_choice": {"type": "function", "name": "set_lamp"}}
_RUN: dict[str, Any] = {
    "max_output_tokens": _MAX_TOKENS,
    "tools": [_CUSTOM],
    "tool_choice": {"type": "custom", "name": "run"},
}
_FORMAT = {"type": "json_schema", "name": "sky", "schema": _SCHEMA, "strict": True}


def _item(answer: Answer, kind: str) -> Any:
    require(answer.status == 200, f"status {answer.status}: {answer.body[:80]!r}")
    for item in answer.json["output"]:
        if item["type"] == kind:
            return item
    raise NotShown(f"there is no {kind}: {[item['type'] for item in answer.json['output']]}")


def _text(answer: Answer) -> str:
    return "".join(part["text"] for part in _item(answer, "message")["content"])


def _stream(server: Server, **fields: Any) -> list[Any]:
    return server.once(RESPONSES, stream=True, **{"max_output_tokens": 5} | fields).events


def created_now(server: Server) -> None:
    created = server.post(RESPONSES, {}).json.get("created_at")
    require(isinstance(created, int | float), f"created_at is {created!r}")
    require(abs(created - time.time()) < _CLOCK_SECONDS, "created_at is not now")


def required(server: Server) -> None:
    name = _item(server.once(RESPONSES, **_CALL), "function_call")["name"]
    require(name in ("get_sky", "set_lamp"), f"it calls {name!r}")


def arguments(server: Server) -> None:
    given = _item(server.once(RESPONSES, **_CALL), "function_call")["arguments"]
    require(isinstance(given, str), f"the arguments are {type(given).__name__}, not a string")
    _validate(given)


def _validate(text: str) -> None:
    try:
        jsonschema.validate(json.loads(text), _SCHEMA)
    except (ValueError, jsonschema.ValidationError) as error:
        raise NotShown(f"{text[:50]!r}: {str(error)[:60]}") from None


def call_ids(server: Server) -> None:
    call = _item(server.once(RESPONSES, **_CALL), "function_call")
    require(call.get("id") and call.get("call_id"), f"the call has no id or call_id: {call}")
    require(call["id"] != call["call_id"], "id and call_id are the same")
    require(call.get("status") == "completed", f"its status is {call.get('status')!r}")


def named(server: Server) -> None:
    name = _item(server.once(RESPONSES, **_NAMED), "function_call")["name"]
    require(name == "set_lamp", f"it calls {name!r}")


def no_call(server: Server) -> None:
    _item(server.once(RESPONSES, **_CALL | {"tool_choice": "none", "max_output_tokens": 3}), "message")


def custom(server: Server) -> None:
    answer = server.once(RESPONSES, **_RUN)
    if answer.json.get("status") == "incomplete":
        return  # a model may write on and on
    call = _item(answer, "custom_tool_call")
    require(call["name"] == "run", f"it calls {call['name']!r}")
    require(isinstance(call["input"], str), "the input is not a string")


def namespace(server: Server) -> None:
    tool = {"type": "namespace", "name": "home", "description": "At home.", "tools": [_LAMP]}
    call = _item(server.once(RESPONSES, **_CALL | {"tools": [tool]}), "function_call")
    require(
        (call["name"], call.get("namespace")) == ("set_lamp", "home"),
        f"it calls {call['name']!r} of {call.get('namespace')!r}",
    )


def built_in(server: Server) -> None:
    tools = [{"type": "web_search"}, _SKY]
    _item(server.once(RESPONSES, **_CALL | {"tools": tools}), "function_call")


def echoed_tools(server: Server) -> None:
    echoed = server.once(RESPONSES, **_CALL).json["tools"]
    names = [tool.get("name") for tool in echoed]
    require(names == ["get_sky", "set_lamp"], f"the tools are {names}")


def completed_calls(server: Server) -> None:
    status = server.once(RESPONSES, **_CALL).json["status"]
    require(status == "completed", f"the status is {status!r}")


def result(server: Server) -> None:
    call = _item(server.once(RESPONSES, **_CALL), "function_call")
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "clear"}
    history = [{"role": "user", "content": "How is the sky?"}, call, output]
    _item(server.post(RESPONSES, {"input": history, "tools": [_SKY], "tool_choice": "none"}), "message")


def json_schema(server: Server) -> None:
    _validate(_text(server.once(RESPONSES, max_output_tokens=_MAX_TOKENS, text={"format": _FORMAT})))


def json_object(server: Server) -> None:
    answer = server.once(RESPONSES, max_output_tokens=_MAX_TOKENS, text={"format": {"type": "json_object"}})
    text = _text(answer)
    require(text.startswith("{"), f"the text is {text[:30]!r}")
    if answer.json["status"] == "completed":
        require(isinstance(json.loads(text), dict), f"the text is {text[:30]!r}")


def format_echoed(server: Server) -> None:
    answer = server.once(RESPONSES, max_output_tokens=_MAX_TOKENS, text={"format": _FORMAT})
    shown = judge.find(answer.json, "text.format")
    require(isinstance(shown, dict) and shown.get("schema") == _SCHEMA, f"text.format is {str(shown)[:60]}")


def _with_logprobs(server: Server) -> list[Any]:
    answer = server.once(
        RESPONSES, max_output_tokens=4, include=["message.output_text.logprobs"], top_logprobs=2
    )
    found: list[Any] = _item(answer, "message")["content"][0].get("logprobs") or []
    require(found, "there are no log-probabilities")
    return found


def logprobs(server: Server) -> None:
    answer = server.once(
        RESPONSES, max_output_tokens=4, include=["message.output_text.logprobs"], top_logprobs=2
    )
    text = "".join(item["token"] for item in _with_logprobs(server))
    require(text == _text(answer), f"the tokens are {text!r}, the text {_text(answer)!r}")


def top_logprobs(server: Server) -> None:
    counts = {len(item["top_logprobs"]) for item in _with_logprobs(server)}
    require(counts == {2}, f"there are {counts} alternatives")


def first_events(server: Server) -> None:
    names = [event["type"] for event in _stream(server)[:2]]
    require(names == ["response.created", "response.in_progress"], f"they are {names}")


def last_event(server: Server) -> None:
    last = _stream(server)[-1]
    require(last["type"] in ("response.completed", "response.incomplete"), f"it is {last['type']}")
    plain = server.once(RESPONSES, max_output_tokens=5).json
    for name in ("status", "incomplete_details", "usage"):
        one, other = last["response"][name], plain[name]
        if name == "usage":  # the cache may have been warm
            one, other = one["output_tokens"], other["output_tokens"]
        require(one == other, f"{name} is {one}, and {other} without a stream")


def numbers(server: Server) -> None:
    found = [event.get("sequence_number") for event in _stream(server)]
    require(found == [*range(len(found))], f"they are {found[:8]}")


def order(server: Server) -> None:
    names = [event["type"] for event in _stream(server)]
    for before, after in (
        ("response.in_progress", "response.output_item.added"),
        ("response.output_item.added", "response.content_part.added"),
        ("response.content_part.added", "response.output_text.delta"),
        ("response.output_text.delta", "response.output_text.done"),
        ("response.output_text.done", "response.content_part.done"),
        ("response.content_part.done", "response.output_item.done"),
    ):
        require(before in names, f"there is no {before}")
        require(after in names, f"there is no {after}")
        require(names.index(before) < names.index(after), f"{after} comes before {before}")


def _deltas(events: list[Any], kind: str) -> str:
    return "".join(event["delta"] for event in events if event["type"] == f"response.{kind}.delta")


def _done(events: list[Any], name: str) -> Any:
    found = [event for event in events if event["type"] == f"response.{name}"]
    require(len(found) == 1, f"there are {len(found)} response.{name}")
    return found[0]


def deltas(server: Server) -> None:
    events = _stream(server)
    text = _deltas(events, "output_text")
    done = _done(events, "output_text.done")["text"]
    final = events[-1]["response"]["output"][0]["content"][0]["text"]
    require(text == done == final, f"they are {text!r}, {done!r} and {final!r}")


def same_text(server: Server) -> None:
    streamed = _deltas(_stream(server), "output_text")
    plain = _text(server.once(RESPONSES, max_output_tokens=5))
    require(streamed == plain, f"the stream is {streamed!r}, not {plain!r}")


def ids(server: Server) -> None:
    events = _stream(server)
    item = events[-1]["response"]["output"][0]["id"]
    given = {(event["item_id"], event["output_index"]) for event in events if "item_id" in event}
    require(given == {(item, 0)}, f"they are {given}, and the item is {item}")


def streamed_call(server: Server) -> None:
    events = _stream(server, **_CALL)
    text = _deltas(events, "function_call_arguments")
    done = _done(events, "function_call_arguments.done")["arguments"]
    item = _done(events, "output_item.done")["item"]
    require(text == done == item["arguments"], f"they are {text!r}, {done!r} and {item['arguments']!r}")
    _validate(text)


def streamed_custom(server: Server) -> None:
    events = _stream(server, **_RUN)
    if events[-1]["type"] == "response.incomplete":
        return
    text = _deltas(events, "custom_tool_call_input")
    item = _done(events, "output_item.done")["item"]
    require(text == item["input"], f"they are {text!r} and {item['input']!r}")


def content_type(server: Server) -> None:
    answer = server.once(RESPONSES, stream=True, max_output_tokens=5)
    judge.check_header(answer, "content-type", "^text/event-stream")


def no_done(server: Server) -> None:
    require(b"[DONE]" not in server.once(RESPONSES, stream=True, max_output_tokens=5).body, "it has [DONE]")


def unknown_model(server: Server) -> None:
    answer = server.post(RESPONSES, {"model": "nothing-of-the-kind", "stream": True})
    judge.check_error(answer, 404, code="model_not_found")


def types(server: Server) -> None:
    for fields in ({}, _CALL, {"text": {"format": _FORMAT}}):
        server.post(RESPONSES, fields)
        server.post(RESPONSES, fields | {"stream": True})
    found = [line for line in server.complaints if line.startswith("Response")]
    require(not found, "; ".join(sorted(set(found))[:3]))
