"""Tool calls. Checks never depend on what a model wants to call, only on required calls and their format."""

from __future__ import annotations

import json
from typing import Any

import jsonschema

from tests.conformance import judge
from tests.conformance.server import CHAT, Answer, NotShown, Server, require

_MAX_TOKENS = 60


def _function(name: str, parameter: str, *values: str, **more: Any) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {parameter: {"type": "string", "enum": [*values]}},
        "required": [parameter],
        "additionalProperties": False,
    }
    return {
        "type": "function",
        "function": {"name": name, "description": "It.", "parameters": parameters} | more,
    }


_TOOLS = [_function("get_sky", "city", "Rome", "Oslo"), _function("set_lamp", "state", "on", "off")]
_USUAL: dict[str, Any] = {
    "max_tokens": _MAX_TOKENS,
    "tools": _TOOLS,
    "tool_choice": "required",
    "parallel_tool_calls": False,
}
_PARAMETERS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in _TOOLS}


def _ask(server: Server, **fields: Any) -> Answer:
    return server.once(CHAT, **_USUAL | fields)


def _calls(answer: Answer, index: int = 0) -> list[Any]:
    calls = answer.choice(index)["message"].get("tool_calls") or []
    if not calls:
        raise NotShown(f"there is no call: {str(answer.choice(index)['message'].get('content'))[:50]!r}")
    found: list[Any] = calls
    return found


def _validate(calls: list[Any]) -> None:
    for call in calls:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        require(name in _PARAMETERS, f"it calls {name!r}")
        require(isinstance(arguments, str), f"the arguments are {type(arguments).__name__}, not a string")
        try:
            jsonschema.validate(json.loads(arguments), _PARAMETERS[name])
        except (ValueError, jsonschema.ValidationError) as error:
            raise NotShown(f"{arguments[:50]!r}: {str(error)[:60]}") from None


def required(server: Server) -> None:
    names = {call["function"]["name"] for call in _calls(_ask(server))}
    require(names <= set(_PARAMETERS), f"it calls {names}")


def arguments(server: Server) -> None:
    _validate(_calls(_ask(server)))


def hot(server: Server) -> None:
    for answer in server.concurrent_chats([_USUAL | {"temperature": 2, "seed": seed} for seed in range(3)]):
        _validate(_calls(answer))


def no_content(server: Server) -> None:
    answer = _ask(server)
    _calls(answer)
    message = answer.choice()["message"]
    require(
        "content" in message and message["content"] is None,
        f"content is {message.get('content', 'not there')!r}",
    )


def finish_reason(server: Server) -> None:
    answer = _ask(server)
    _calls(answer)
    require(answer.choice()["finish_reason"] == "tool_calls", f"it is {answer.choice()['finish_reason']!r}")


def ids(server: Server) -> None:
    found = [call for seed in range(2) for call in _calls(_ask(server, seed=seed))]
    require(all(isinstance(call["id"], str) and call["id"] for call in found), "a call has no id")
    require(len({call["id"] for call in found}) == len(found), "two have the same id")
    require({call["type"] for call in found} == {"function"}, "a type is not function")


def named(server: Server) -> None:
    for name in _PARAMETERS:
        calls = _calls(_ask(server, tool_choice={"type": "function", "function": {"name": name}}))
        require([call["function"]["name"] for call in calls] == [name], f"{name} is not the named function")
        _validate(calls)


def none(server: Server) -> None:
    answer = _ask(server, tool_choice="none", parallel_tool_calls=None, max_tokens=4)
    require(not answer.choice()["message"].get("tool_calls"), "there are calls")
    require(isinstance(answer.choice()["message"]["content"], str), "there is no text")


def auto(server: Server, fields: dict[str, Any]) -> None:
    answer = server.chat(tools=_TOOLS, max_tokens=8, **fields)
    message = answer.choice()["message"]
    if message.get("tool_calls"):
        require(answer.choice()["finish_reason"] == "tool_calls", "finish_reason is not tool_calls")
    else:
        require(isinstance(message["content"], str), f"content is {message['content']!r}")


def not_parallel(server: Server) -> None:
    for answer in (_ask(server), _ask(server, temperature=2, seed=1)):
        calls = _calls(answer)
        require(len(calls) == 1, f"there are {len(calls)}")


def strict(server: Server) -> None:
    tool = _function("set_lamp", "state", "on", "off", strict=True)
    _validate(_calls(_ask(server, tools=[tool], temperature=2, seed=1)))


def no_parameters(server: Server) -> None:
    calls = _calls(_ask(server, tools=[{"type": "function", "function": {"name": "ring"}}]))
    require(
        json.loads(calls[0]["function"]["arguments"]) == {}, f"it is {calls[0]['function']['arguments']!r}"
    )


def _streamed(answer: Answer) -> list[dict[str, Any]]:
    """The calls, assembled from the deltas of a stream."""
    calls: dict[int, dict[str, Any]] = {}
    for chunk in answer.chunks:
        for choice in chunk["choices"]:
            for delta in choice["delta"].get("tool_calls") or []:
                function = delta.get("function") or {}
                if delta["index"] not in calls:
                    require(
                        delta.get("id") and delta.get("type") == "function", f"a call begins with {delta}"
                    )
                    require(function.get("name"), "a call begins without a name")
                    calls[delta["index"]] = {"id": delta["id"], "name": function["name"], "arguments": ""}
                else:
                    require(not delta.get("id") and not function.get("name"), "the id or name comes again")
                calls[delta["index"]]["arguments"] += function.get("arguments") or ""
    require(calls, "there is no call in the stream")
    require(sorted(calls) == [*range(len(calls))], f"the indices are {sorted(calls)}")
    return [*calls.values()]


def stream(server: Server) -> None:
    for call in _streamed(_ask(server, stream=True)):
        _validate([{"function": call}])


def stream_equals_plain(server: Server) -> None:
    plain = [call["function"] for call in _calls(_ask(server))]
    streamed = _streamed(_ask(server, stream=True))
    require(
        [(call["name"], call["arguments"]) for call in plain]
        == [(call["name"], call["arguments"]) for call in streamed],
        f"{streamed} is not {plain}",
    )


def stream_finish_reason(server: Server) -> None:
    answer = _ask(server, stream=True)
    _streamed(answer)
    reasons = [c["finish_reason"] for chunk in answer.chunks for c in chunk["choices"] if c["finish_reason"]]
    require(reasons == ["tool_calls"], f"the reasons are {reasons}")


def each_choice(server: Server) -> None:
    answer = _ask(server, n=2, temperature=1)
    for index in range(2):
        _validate(_calls(answer, index))


def allowed_tools(server: Server) -> None:
    lamp = {"type": "function", "function": {"name": "set_lamp"}}
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [lamp]}}
    calls = _calls(_ask(server, tool_choice=choice, temperature=2, seed=2))
    require({call["function"]["name"] for call in calls} == {"set_lamp"}, "another is called")


def deprecated(server: Server) -> None:
    functions = [tool["function"] for tool in _TOOLS]
    answer = server.chat(functions=functions, function_call={"name": "set_lamp"}, max_tokens=_MAX_TOKENS)
    if answer.status != 200:
        judge.check_error(answer, 400, param="function")
        return
    call = answer.choice()["message"].get("function_call")
    require(call, "there is no function_call")
    _validate([{"function": call}])
