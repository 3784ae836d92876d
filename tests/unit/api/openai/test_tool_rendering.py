"""Tool calls and reasoning in an answer, streamed and complete, in OpenAI's form."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from api.generation.front_end import AnswerEvent
from api.openai.chat.rendering import ChatRendering
from common.protocol import (
    Delta,
    Finished,
    Reasoning,
    TokenLogprob,
    ToolArguments,
    ToolCall,
    Usage,
)
from tests.unit.api.openai.records import record

END = Finished(9, "tool_calls", Usage(3, 8, 0, 2))
EVENTS: list[AnswerEvent] = [
    Delta(1, 1, "", pieces=[Reasoning("h")]),
    Delta(2, 2, "Look", pieces=[Reasoning("m")]),
    Delta(3, 3, ": ", pieces=[ToolCall(0, "f")]),
    Delta(4, 4, pieces=[ToolArguments(0, '{"a":')]),
    Delta(5, 5, pieces=[ToolArguments(0, '"é"}')]),
    Delta(6, 6, pieces=[ToolCall(1, "g"), ToolArguments(1, "{}")]),
]


def stream(
    rendering: ChatRendering, events: list[AnswerEvent], finished: Finished = END
) -> list[dict[str, Any]]:
    data = rendering.opening() + rendering.frames(0, [*events, finished]) + rendering.closing([finished])
    frames = data.decode().removesuffix("\n\n").split("\n\n")
    assert frames[-1] == "data: [DONE]"
    return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-1]]


def rendering(**more: Any) -> ChatRendering:
    return ChatRendering(record(**more))


def whole(events: list[AnswerEvent], finished: Finished = END, **more: Any) -> dict[str, Any]:
    rendered = rendering(**more)
    rendered.add(0, events)
    body: dict[str, Any] = json.loads(rendered.body([finished]))
    return body


def test_a_complete_answer_with_calls() -> None:
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


def test_content_is_null_if_there_are_only_calls() -> None:
    """And only then: an empty answer is an empty string."""
    call = Delta(1, 1, pieces=[ToolCall(0, "f")])
    assert whole([call])["choices"][0]["message"]["content"] is None
    assert whole([], Finished(1, "stop", Usage(1, 1)))["choices"][0]["message"] == {
        "role": "assistant",
        "content": "",
        "refusal": None,
    }


def test_a_stream_of_calls() -> None:
    """A call begins with its id and name without arguments; reasoning precedes content, calls follow it."""
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
    """openai's own accumulator assembles the chunks to the complete answer."""
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
    """The same record and events give the same ids; other choices and other answers have different ones."""
    calls: list[AnswerEvent] = [Delta(1, 1, pieces=[ToolCall(0, "f")])]

    def call_id(job_id: str, index: int) -> str:
        rendered = ChatRendering(record(2, job_id=job_id))
        rendered.add(index, calls)
        body = json.loads(rendered.body([END, END]))
        return str(body["choices"][index]["message"]["tool_calls"][0]["id"])

    assert call_id("1", 0) == call_id("1", 0)
    assert len({call_id("1", 0), call_id("1", 1), call_id("2", 0)}) == 3


def test_the_deprecated_form() -> None:
    """A request with `functions` is answered with `function_call`, complete and streamed."""
    events = [*EVENTS[2:5]]
    body = whole(events, as_function_call=True)
    message = ChatCompletion.model_validate(body).choices[0].message
    assert message.tool_calls is None
    assert message.function_call is not None
    assert (message.function_call.name, message.function_call.arguments) == ("f", '{"a":"é"}')
    assert body["choices"][0]["finish_reason"] == "function_call"
    chunks = stream(rendering(as_function_call=True), events)
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
        [  # white space and a marker without any reasoning after it
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
def test_logprobs_are_those_of_the_content(events: list[AnswerEvent]) -> None:
    """Items concatenate to the content, as text and as bytes, whatever was removed from the text."""
    for logprobs in (
        [chunk["choices"][0]["logprobs"] for chunk in stream(rendering(with_logprobs=True), events)],
        [whole(events, with_logprobs=True)["choices"][0]["logprobs"]],
    ):
        items = [item for part in logprobs if part for item in part["content"]]
        assert "".join(item["token"] for item in items) == "Hi bye"
        assert bytes(byte for item in items for byte in item["bytes"]) == b"Hi bye"


CUSTOM_EVENTS: list[AnswerEvent] = [
    Delta(1, 1, pieces=[ToolCall(0, "run")]),
    Delta(2, 2, pieces=[ToolArguments(0, '{"input')]),
    Delta(3, 3, pieces=[ToolArguments(0, '":"a\\')]),
    Delta(4, 4, pieces=[ToolArguments(0, 'n\\u00e9"}')]),
    Delta(5, 5, pieces=[ToolCall(1, "run"), ToolArguments(1, "plain")]),
    Delta(6, 6, pieces=[ToolCall(2, "f"), ToolArguments(2, '{"input":"b"}')]),
    Delta(7, 7, pieces=[ToolCall(3, "run"), ToolArguments(3, "last")]),
]
CUSTOM_INPUTS = [{"name": "run", "input": text} for text in ("a\né", "plain", "last")]


def test_a_complete_answer_with_calls_of_custom_tools() -> None:
    """Their input is plain text; other functions stay functions. OpenAI's types accept both."""
    body = whole(CUSTOM_EVENTS, custom_tools=["run"])
    (choice,) = ChatCompletion.model_validate(body, strict=True).choices
    calls = choice.message.tool_calls
    assert calls is not None
    assert [call.type for call in calls] == ["custom", "custom", "function", "custom"]
    assert [call.custom.model_dump() for call in calls if call.type == "custom"] == CUSTOM_INPUTS
    assert [call.function.arguments for call in calls if call.type == "function"] == ['{"input":"b"}']


def test_the_input_of_a_custom_tool_is_streamed() -> None:
    """Without its JSON, as it arrives; the parts and the ids are those of the complete answer."""
    deltas = [
        chunk["choices"][0]["delta"] for chunk in stream(rendering(custom_tools=["run"]), CUSTOM_EVENTS)
    ]
    parts = [call for delta in deltas for call in delta.get("tool_calls", [])]
    calls: dict[int, dict[str, Any]] = {}
    for part in parts:
        call = calls.setdefault(part["index"], {"input": ""} | part)
        call["input"] += part.get("custom", {}).get("input", "")
    (choice,) = whole(CUSTOM_EVENTS, custom_tools=["run"])["choices"]
    complete = choice["message"]["tool_calls"]
    assert [call["id"] for call in calls.values()] == [call["id"] for call in complete]
    assert [call["type"] for call in calls.values()] == [call["type"] for call in complete]
    inputs = [call["input"] for call in calls.values() if call["type"] == "custom"]
    assert inputs == [each["input"] for each in CUSTOM_INPUTS]
    assert [part["custom"] for part in parts if part["index"] == 0][1:] == [{"input": "a"}, {"input": "\né"}]


def test_a_custom_call_cut_before_its_input() -> None:
    """Its input is empty, in a stream as in a complete answer."""
    events: list[AnswerEvent] = [Delta(1, 1, pieces=[ToolCall(0, "run"), ToolArguments(0, '{"inp')])]
    (choice,) = whole(events, custom_tools=["run"])["choices"]
    assert choice["message"]["tool_calls"][0]["custom"] == {"name": "run", "input": ""}
    chunks = stream(rendering(custom_tools=["run"]), events)
    parts = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert [part["custom"] for part in parts] == [{"name": "run", "input": ""}]
