"""Functions in a request and calls in an answer, as OpenAI describes both."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from api import chat_request
from api.answer import Answer
from api.chat_rendering import ChatRendering
from api.generation_request import GenerationRequest
from common.errors import RequestError
from common.protocol import (
    ChatPrompt,
    Delta,
    Event,
    Finished,
    Reasoning,
    TokenLogprob,
    ToolArguments,
    ToolCall,
    ToolUse,
    Usage,
)

HI = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}


def tool(name: Any = "f", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name} | more}


def parsed(name: str, parameters: Any = None, **more: Any) -> dict[str, Any]:
    """A tool as it travels."""
    return tool(name, parameters=parameters or {"type": "object", "properties": {}}, **more)


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def allowed(*names: str, mode: str = "auto") -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named(n) for n in names]}}


def parse(**fields: Any) -> GenerationRequest:
    return chat_request.parse(json.dumps({"messages": HI} | fields).encode())


def prompt(**fields: Any) -> ChatPrompt:
    (only,) = parse(**fields).prompts
    assert isinstance(only, ChatPrompt)
    return only


F, G = tool("f"), tool("g")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"tools": [tool("f")]}, ToolUse(tools=[parsed("f")])),
        (
            {"tools": [tool("f-1_X", description="d", parameters=SCHEMA, strict=True)]},
            ToolUse(tools=[parsed("f-1_X", SCHEMA, description="d", strict=True)]),
        ),
        ({"tools": [tool("f", parameters={}, strict=None, description=None)]}, ToolUse(tools=[parsed("f")])),
        ({"tools": [F], "tool_choice": "auto"}, ToolUse(tools=[parsed("f")])),
        ({"tools": [F], "tool_choice": None}, ToolUse(tools=[parsed("f")])),
        ({"tools": [F], "tool_choice": "none"}, None),
        ({"tools": [F], "tool_choice": "required"}, ToolUse(tools=[parsed("f")], is_required=True)),
        (
            {"tools": [F, G], "tool_choice": named("g")},
            ToolUse(tools=[parsed("f"), parsed("g")], is_required=True, function="g", is_parallel=False),
        ),
        ({"tools": [F, G], "tool_choice": allowed("g")}, ToolUse(tools=[parsed("g")])),
        (
            {"tools": [F, G], "tool_choice": allowed("g", "f", mode="required")},
            ToolUse(tools=[parsed("f"), parsed("g")], is_required=True),
        ),
        ({"tools": [F], "parallel_tool_calls": True}, ToolUse(tools=[parsed("f")])),
        ({"tools": [F], "parallel_tool_calls": False}, ToolUse(tools=[parsed("f")], is_parallel=False)),
        ({"functions": [F["function"]]}, ToolUse(tools=[parsed("f")], is_parallel=False)),
        ({"functions": [F["function"]], "function_call": "none"}, None),
        (
            {"functions": [F["function"]], "function_call": {"name": "f"}},
            ToolUse(tools=[parsed("f")], is_required=True, function="f", is_parallel=False),
        ),
        ({"tools": [], "tool_choice": "none"}, None),
        ({}, None),
    ],
    ids=lambda value: json.dumps(value)[:80] if isinstance(value, dict) else "",
)
def test_functions_reach_the_worker(fields: dict[str, Any], expected: ToolUse | None) -> None:
    """Each way to say what may be called comes down to one value."""
    request = parse(**fields)
    assert request.tool_use == expected
    assert request.jobs("m", "c", [1])[0].tool_use == expected
    assert request.answers_functions == ("functions" in fields)
    assert request.ignored == []


def assistant(*calls: Any, **more: Any) -> list[dict[str, Any]]:
    return [*HI, {"role": "assistant", "content": None, "tool_calls": list(calls)} | more]


def made(arguments: Any = "{}", **more: Any) -> dict[str, Any]:
    return {"id": "x", "type": "function", "function": {"name": "f", "arguments": arguments}} | more


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": [5]}, "tools[0]"),
        ({"tools": [{}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [tool(5)]}, "tools[0].function.name"),
        ({"tools": [tool("")]}, "tools[0].function.name"),
        ({"tools": [tool("a b")]}, "tools[0].function.name"),
        ({"tools": [tool("f\n")]}, "tools[0].function.name"),
        ({"tools": [tool("é")]}, "tools[0].function.name"),
        ({"tools": [tool("x" * 65)]}, "tools[0].function.name"),
        ({"tools": [F, tool("f")]}, "tools[1].function.name"),
        ({"tools": [tool(f"f{i}") for i in range(129)]}, "tools"),
        ({"tools": [tool(description=5)]}, "tools[0].function.description"),
        ({"tools": [tool(strict="yes")]}, "tools[0].function.strict"),
        ({"tools": [tool(parameters="{}")]}, "tools[0].function.parameters"),
        ({"tools": [tool(parameters={"type": "string"})]}, "tools[0].function.parameters"),
        (
            {"tools": [tool(parameters={"type": "object", "properties": []})]},
            "tools[0].function.parameters.properties",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [], "tool_choice": named("f")}, "tool_choice"),
        ({"tools": [F], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [F], "tool_choice": 5}, "tool_choice"),
        ({"tools": [F], "tool_choice": {}}, "tool_choice.type"),
        ({"tools": [F], "tool_choice": {"type": "custom", "custom": {"name": "f"}}}, "tool_choice.type"),
        ({"tools": [F], "tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"tools": [F], "tool_choice": named("g")}, "tool_choice.function.name"),
        ({"tools": [F], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools"),
        ({"tools": [F], "tool_choice": allowed("f", mode="none")}, "tool_choice.allowed_tools.mode"),
        ({"tools": [F], "tool_choice": allowed()}, "tool_choice.allowed_tools.tools"),
        (
            {"tools": [F], "tool_choice": allowed("f", "g")},
            "tool_choice.allowed_tools.tools[1].function.name",
        ),
        ({"tools": [F], "parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"functions": [F["function"]], "tools": [F]}, "tools"),
        ({"functions": [F["function"]], "tool_choice": "auto"}, "tool_choice"),
        ({"functions": [{"name": "f"}, {"name": "f"}]}, "functions[1].name"),
        ({"functions": [{"name": "f", "parameters": {"type": "array"}}]}, "functions[0].parameters"),
        ({"functions": [{"name": "f"}], "function_call": {"name": "g"}}, "function_call.name"),
        ({"functions": [{"name": "f"}], "function_call": "required"}, "function_call"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"messages": [{"role": "tool", "content": "hi"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "tool", "content": "hi", "tool_call_id": 5}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "tool", "tool_call_id": "x"}]}, "messages[0].content"),
        ({"messages": [{"role": "function", "content": "hi"}]}, "messages[0].name"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [made()]}]}, "messages[0].tool_calls"),
        (
            {"messages": [{"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}]},
            "messages[0].content[0].type",
        ),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": []}]}, "messages[0].content"),
        ({"messages": assistant({"id": "x"})}, "messages[1].tool_calls[0].type"),
        ({"messages": assistant({"id": "x", "type": "function"})}, "messages[1].tool_calls[0].function"),
        ({"messages": assistant(made(type="custom"))}, "messages[1].tool_calls[0].type"),
        ({"messages": assistant(made(id=None))}, "messages[1].tool_calls[0].id"),
        ({"messages": assistant(made("{"))}, "messages[1].tool_calls[0].function.arguments"),
        ({"messages": assistant(made("[]"))}, "messages[1].tool_calls[0].function.arguments"),
        ({"messages": assistant(made({}))}, "messages[1].tool_calls[0].function.arguments"),
        ({"messages": assistant(made("[" * 100_000))}, "messages[1].tool_calls[0].function.arguments"),
        (
            {"messages": [{"role": "assistant", "function_call": {"name": "f", "arguments": "5"}}]},
            "messages[0].function_call.arguments",
        ),
        ({"reasoning_effort": "much"}, "reasoning_effort"),
        ({"reasoning_effort": 5}, "reasoning_effort"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs.chat_template"),
        ({"chat_template_kwargs": {"return_tensors": "np"}}, "chat_template_kwargs.return_tensors"),
        ({"chat_template_kwargs": {"tools": True}}, "chat_template_kwargs.tools"),
        (
            {"chat_template_kwargs": {"add_generation_prompt": False}},
            "chat_template_kwargs.add_generation_prompt",
        ),
        ({"chat_template_kwargs": {"enable_thinking": "no"}}, "chat_template_kwargs.enable_thinking"),
        ({"chat_template_kwargs": {"thinking_budget": True}}, "chat_template_kwargs.thinking_budget"),
        ({"chat_template_kwargs": {"reasoning_effort": ["low"]}}, "chat_template_kwargs.reasoning_effort"),
        ({"chat_template_kwargs": {"date_string": "x" * 999}}, "chat_template_kwargs.date_string"),
        (
            {"chat_template_kwargs": {"enable_thinking": True}, "reasoning_effort": "none"},
            "reasoning_effort",
        ),
    ],
    ids=lambda value: json.dumps(value)[:90] if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    """A 400 that says where."""
    with pytest.raises(RequestError) as raised:
        parse(**fields)
    assert (raised.value.status, raised.value.type, raised.value.param) == (
        400,
        "invalid_request_error",
        param,
    )


def test_messages_with_calls_reach_the_template_as_it_knows_them() -> None:
    """Arguments become an object, results get their function's name, and what was thought or refused stays."""
    messages = [
        *assistant(made('{"a": 1}'), made("", id="y"), reasoning_content="hm"),
        {
            "role": "tool",
            "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "2"}],
            "tool_call_id": "x",
        },
        {"role": "tool", "content": "", "tool_call_id": "?"},
        {"role": "assistant", "content": None, "refusal": "no"},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "b"}],
        },
        {"role": "assistant", "content": "c", "tool_calls": []},
    ]

    def call(call_id: str, arguments: Any) -> dict[str, Any]:
        return {"id": call_id, "type": "function", "function": {"name": "f", "arguments": arguments}}

    assert prompt(messages=messages).messages == [
        *HI,
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "hm",
            "tool_calls": [call("x", {"a": 1}), call("y", {})],
        },
        {"role": "tool", "content": "12", "tool_call_id": "x", "name": "f"},
        {"role": "tool", "content": "", "tool_call_id": "?"},
        {"role": "assistant", "content": "no"},
        {"role": "assistant", "content": "ab"},
        {"role": "assistant", "content": "c"},
    ]


def test_the_deprecated_messages_become_calls_and_results() -> None:
    """The result belongs to the call, though neither has an id."""
    messages = [
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "1"},
    ]
    call, result = prompt(messages=messages).messages
    assert call["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}
    assert result == {
        "role": "tool",
        "content": "1",
        "name": "f",
        "tool_call_id": call["tool_calls"][0]["id"],
    }


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"chat_template_kwargs": {}}, {}),
        ({"chat_template_kwargs": {"enable_thinking": None}}, {}),
        ({"reasoning_effort": "high"}, {"reasoning_effort": "high"}),
        ({"reasoning_effort": "none"}, {"reasoning_effort": "none", "enable_thinking": False}),
        (
            {
                "chat_template_kwargs": {"enable_thinking": False, "thinking_budget": 5},
                "reasoning_effort": "low",
            },
            {"enable_thinking": False, "thinking_budget": 5, "reasoning_effort": "low"},
        ),
    ],
)
def test_what_the_template_is_told(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    """Reasoning effort and the safe keywords."""
    assert prompt(**fields).template_arguments == expected


# -- answers -----------------------------------------------------------------------------------------------------------

ANSWER = Answer(id="chatcmpl-1", created=5, model="m", fingerprint="fp_1")
END = Finished(9, "tool_calls", Usage(3, 8, 0, 2))
EVENTS: list[Event] = [
    Delta(1, 1, "", pieces=[Reasoning("h")]),
    Delta(2, 2, "Look", pieces=[Reasoning("m")]),
    Delta(3, 3, ": ", pieces=[ToolCall(0, "f")]),
    Delta(4, 4, pieces=[ToolArguments(0, '{"a":')]),
    Delta(5, 5, pieces=[ToolArguments(0, '"é"}')]),
    Delta(6, 6, pieces=[ToolCall(1, "g"), ToolArguments(1, "{}")]),
]


def stream(rendering: ChatRendering, events: list[Event], finished: Finished = END) -> list[dict[str, Any]]:
    data = rendering.opening() + rendering.frames(0, [*events, finished]) + rendering.closing([finished])
    frames = data.decode().removesuffix("\n\n").split("\n\n")
    assert frames[-1] == "data: [DONE]"
    return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-1]]


def rendering(**more: Any) -> ChatRendering:
    return ChatRendering(ANSWER, **({"with_logprobs": False, "include_usage": False} | more))


def whole(events: list[Event], finished: Finished = END, **more: Any) -> dict[str, Any]:
    rendered = rendering(**more)
    rendered.add(0, events)
    body: dict[str, Any] = json.loads(rendered.body([finished]))
    return body


def test_a_whole_answer_with_calls() -> None:
    """Content, reasoning and calls, of OpenAI's types; the reasoning is counted."""
    body = whole(EVENTS)
    completion = ChatCompletion.model_validate(body, strict=True)
    (choice,) = completion.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Look: "
    assert body["choices"][0]["message"]["reasoning_content"] == "hm"
    calls = body["choices"][0]["message"]["tool_calls"]
    assert [(c["type"], c["function"]) for c in calls] == [
        ("function", {"name": "f", "arguments": '{"a":"é"}'}),
        ("function", {"name": "g", "arguments": "{}"}),
    ]
    assert len({c["id"] for c in calls}) == 2
    assert all(c["id"].startswith("call_") for c in calls)
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2}


def test_content_is_null_beside_calls_alone() -> None:
    """And only there: an answer of nothing is an empty string."""
    call = Delta(1, 1, pieces=[ToolCall(0, "f")])
    assert whole([call])["choices"][0]["message"]["content"] is None
    assert whole([], Finished(1, "stop", Usage(1, 1)))["choices"][0]["message"] == {
        "role": "assistant",
        "content": "",
        "refusal": None,
    }


def test_a_stream_of_calls() -> None:
    """A call begins with its id and name and no arguments; thoughts come before content, calls behind it."""
    chunks = stream(rendering(), EVENTS)
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    first_id, second_id = (c["id"] for c in whole(EVENTS)["choices"][0]["message"]["tool_calls"])
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": "", "refusal": None},
        {"reasoning_content": "h"},
        {"reasoning_content": "m"},
        {"content": "Look"},
        {"content": ": "},
        {
            "tool_calls": [
                {"index": 0, "id": first_id, "type": "function", "function": {"name": "f", "arguments": ""}}
            ]
        },
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"a":'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"é"}'}}]},
        {
            "tool_calls": [
                {"index": 1, "id": second_id, "type": "function", "function": {"name": "g", "arguments": ""}}
            ]
        },
        {"tool_calls": [{"index": 1, "function": {"arguments": "{}"}}]},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-2:] == [None, "tool_calls"]


def test_the_sdk_puts_a_stream_together() -> None:
    """openai's own accumulator makes of the chunks what the whole answer says."""
    state: ChatCompletionStreamState[None] = ChatCompletionStreamState()
    for chunk in stream(rendering(), EVENTS):
        state.handle_chunk(ChatCompletionChunk.model_validate(chunk))
    message = state.current_completion_snapshot.choices[0].message.model_dump()
    expected = whole(EVENTS)["choices"][0]["message"]
    calls = [
        {key: call[key] for key in ("id", "type")}
        | {"function": {k: call["function"][k] for k in ("name", "arguments")}}
        for call in message["tool_calls"]
    ]
    assert calls == expected["tool_calls"]
    assert (message["content"], message["reasoning_content"]) == (
        expected["content"],
        expected["reasoning_content"],
    )


def test_ids_are_the_answers_and_the_choices() -> None:
    """The same events give the same ids, for whoever renders them; choices and answers have their own."""
    calls: list[Event] = [Delta(1, 1, pieces=[ToolCall(0, "f")])]

    def call_id(answer: Answer, index: int) -> str:
        rendered = ChatRendering(answer, 2, with_logprobs=False, include_usage=False)
        rendered.add(index, calls)
        body = json.loads(rendered.body([END, END]))
        return str(body["choices"][index]["message"]["tool_calls"][0]["id"])

    other = Answer(id="chatcmpl-2", created=5, model="m", fingerprint="fp_1")
    assert call_id(ANSWER, 0) == call_id(ANSWER, 0)
    assert len({call_id(ANSWER, 0), call_id(ANSWER, 1), call_id(other, 0)}) == 3


def test_the_deprecated_form() -> None:
    """Who asked with `functions` is answered with `function_call`, whole and streamed."""
    events = [*EVENTS[2:5]]
    body = whole(events, answers_functions=True)
    message = ChatCompletion.model_validate(body).choices[0].message
    assert message.tool_calls is None
    assert message.function_call is not None
    assert (message.function_call.name, message.function_call.arguments) == ("f", '{"a":"é"}')
    assert body["choices"][0]["finish_reason"] == "function_call"
    chunks = stream(rendering(answers_functions=True), events)
    assert [ChatCompletionChunk.model_validate(chunk).choices[0].delta.tool_calls for chunk in chunks] == [
        None
    ] * 6
    assert [chunk["choices"][0]["delta"].get("function_call") for chunk in chunks] == [
        None,
        None,
        {"name": "f", "arguments": ""},
        {"arguments": '{"a":'},
        {"arguments": '"é"}'},
        None,
    ]
    assert chunks[-1]["choices"][0]["finish_reason"] == "function_call"


def own(text: str) -> TokenLogprob:
    return TokenLogprob(1, -1.0, text.encode())


@pytest.mark.parametrize(
    "events",
    [
        [  # the marker is held back, then a call
            Delta(1, 1, "Hi", own("Hi")),
            Delta(2, 2, "", own(" <tool")),
            Delta(3, 3, " ", own("_call>")),
            Delta(4, 4, "", pieces=[ToolCall(0, "f")]),
            Delta(5, 5, "", pieces=[ToolArguments(0, "{}")]),
            Delta(6, 6, "bye", own("bye")),
        ],
        [  # the end of a call and what follows it in one token
            Delta(1, 1, "Hi ", own("Hi ")),
            Delta(2, 2, "", own("<call>")),
            Delta(3, 3, "by", own("</call>by"), pieces=[ToolCall(0, "f"), ToolArguments(0, "{}")]),
            Delta(4, 4, "e", own("e")),
        ],
        [  # white space and a marker without any thought behind it
            Delta(1, 1, "", own(" <think")),
            Delta(2, 2, ""),
            Delta(3, 3, "Hi bye", own("\nHi bye")),
        ],
        [
            Delta(1, 1, "", pieces=[Reasoning("hm")]),
            Delta(2, 2, "Hi", own("\n\nHi")),
            Delta(3, 3, " bye", own(" bye")),
        ],
    ],
)
def test_logprobs_are_those_of_the_content(events: list[Event]) -> None:
    """Items concatenate to the content, as text and as bytes, whatever was taken out of the text."""
    for logprobs in (
        [chunk["choices"][0]["logprobs"] for chunk in stream(rendering(with_logprobs=True), events)],
        [whole(events, with_logprobs=True)["choices"][0]["logprobs"]],
    ):
        items = [item for part in logprobs if part for item in part["content"]]
        assert "".join(item["token"] for item in items) == "Hi bye"
        assert bytes(byte for item in items for byte in item["bytes"]) == b"Hi bye"
