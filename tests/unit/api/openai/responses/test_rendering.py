"""A response as events and as an object: in OpenAI's order and form, and a pure function of the record and the events."""

from __future__ import annotations

import functools
import itertools
import json
import re
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from openai import omit
from openai._models import construct_type_unchecked
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from api.generation.front_end import AnswerEvent
from api.generation.request import AnswerRecord
from api.openai.responses.rendering import ResponseRendering
from api.openai.responses.thoughts import decode_thoughts
from api.openapi import document as openapi
from common.errors import RequestError
from common.protocol import Delta, Finished, Piece, Reasoning, TokenLogprob, ToolArguments, ToolCall, Usage
from common.settings import Settings
from tests.unit.api.openai.responses.requests import record

USAGE = Usage(3, 4, 1, 2)
SPACE = {
    "type": "namespace",
    "name": "mcp__x",
    "description": "x",
    "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
}
RUN = {"type": "custom", "name": "run"}


def answer(*deltas: str | list[Piece], reason: Any = "stop") -> list[AnswerEvent]:
    """A journal: a text is a token's, a list its pieces."""
    events: list[AnswerEvent] = [
        Delta(i + 1, i, delta) if isinstance(delta, str) else Delta(i + 1, i, pieces=delta)
        for i, delta in enumerate(deltas)
    ]
    return [*events, Finished(len(events) + 1, reason, USAGE)]


def stream(described: AnswerRecord, events: list[AnswerEvent]) -> bytes:
    """A complete stream."""
    rendering = ResponseRendering(described)
    end = events[-1]
    assert isinstance(end, Finished)
    return rendering.opening() + rendering.frames(0, events) + rendering.closing([end])


def body(described: AnswerRecord, events: list[AnswerEvent]) -> Any:
    """The object, valid by the description."""
    rendering = ResponseRendering(described)
    rendering.add(0, events)
    end = events[-1]
    assert isinstance(end, Finished)
    made = json.loads(rendering.body([end]))
    assert [str(fault) for fault in described_as("ResponseObject").iter_errors(made)] == []
    return made


@functools.cache
def described_as(name: str) -> Draft202012Validator:
    """A validator that refuses undescribed fields."""
    components = json.loads(msgspec.json.encode(openapi.document(Settings())))["components"]
    for schema in components["schemas"].values():
        if "properties" in schema:
            schema.setdefault("additionalProperties", False)
    return Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": components})


def parsed(data: bytes) -> list[Any]:
    """The events of a stream; each frame has its event's name, and the numbers have no gap."""
    frames = data.decode().split("\n\n")
    assert frames.pop() == ""
    events = []
    for frame in frames:
        found = re.fullmatch(r"event: (\S+)\ndata: (.*)", frame)
        assert found is not None, frame
        event = json.loads(found[2])
        assert event["type"] == found[1]
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def kinds(data: bytes) -> list[str]:
    """The types of the events, without the common prefix."""
    return [event["type"].removeprefix("response.") for event in parsed(data)]


def accumulated(data: bytes) -> Response:
    """What the SDK's `responses.stream` makes of a stream."""
    state: Any = ResponseStreamState(input_tools=[], text_format=omit)
    for event in parsed(data):
        state.handle_event(construct_type_unchecked(value=event, type_=ResponseStreamEvent))  # type: ignore[arg-type]
    return state._completed_response  # type: ignore[no-any-return]


TEXT_EVENTS = ["output_item.added", "content_part.added"]
TEXT_END = ["output_text.done", "content_part.done", "output_item.done"]


def test_a_text() -> None:
    """The order of the events, and the object."""
    data = stream(record(), answer("Hel", "lo"))
    assert kinds(data) == [
        "created",
        "in_progress",
        *TEXT_EVENTS,
        "output_text.delta",
        "output_text.delta",
        *TEXT_END,
        "completed",
    ]
    whole = body(record(), answer("Hel", "lo"))
    assert parsed(data)[-1]["response"] == whole
    [item] = whole["output"]
    assert item == {
        "id": f"msg_{'0' * 30}_0",
        "type": "message",
        "status": "completed",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}],
    }
    assert (whole["id"], whole["object"], whole["created_at"]) == (f"resp_{'0' * 30}", "response", 5)
    assert (whole["status"], whole["error"], whole["incomplete_details"]) == ("completed", None, None)
    assert whole["usage"] == {
        "input_tokens": 3,
        "input_tokens_details": {"cached_tokens": 1, "cache_write_tokens": 0},
        "output_tokens": 4,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 7,
    }


def test_a_text_that_is_cut() -> None:
    """It is incomplete, and says why; so is its item."""
    data = stream(record(max_output_tokens=1), answer("Hel", reason="length"))
    *_, done, last = parsed(data)
    assert done["item"]["status"] == "incomplete"
    assert (last["type"], last["response"]["status"]) == ("response.incomplete", "incomplete")
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert last["response"]["output"][0]["status"] == "incomplete"
    assert last["response"] == body(record(max_output_tokens=1), answer("Hel", reason="length"))


@pytest.mark.parametrize("deltas", [[], ["", ""], [[Reasoning("hm")]]])
def test_an_answer_without_a_text_has_an_empty_one(deltas: Any) -> None:
    """Clients look for a message."""
    output = body(record(), answer(*deltas))["output"]
    assert (output[-1]["type"], output[-1]["content"][0]["text"]) == ("message", "")


def test_reasoning_that_is_cut() -> None:
    """The model came to no message."""
    [item] = body(record(), answer([Reasoning("hm")], reason="length"))["output"]
    assert (item["type"], item["status"]) == ("reasoning", "incomplete")


THINKING = ([Reasoning("h")], [Reasoning("m")], "Yes.")


def test_reasoning() -> None:
    """The thoughts are an item of their own, before the message."""
    data = stream(record(), answer(*THINKING))
    assert kinds(data)[2:9] == [
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
    ]
    thoughts, message = body(record(), answer(*THINKING))["output"]
    assert (thoughts["summary"], thoughts["content"]) == ([], [{"type": "reasoning_text", "text": "hm"}])
    assert "encrypted_content" not in thoughts
    assert (thoughts["id"], message["id"]) == (f"rs_{'0' * 30}_0", f"msg_{'0' * 30}_1")


def test_a_summary() -> None:
    """Asked for one, clients such as Codex show the thoughts as a summary; they are given once, not twice."""
    described = record(reasoning={"summary": "auto"}, include=["reasoning.encrypted_content"])
    assert kinds(stream(described, answer(*THINKING)))[2:9] == [
        "output_item.added",
        "reasoning_summary_part.added",
        "reasoning_summary_text.delta",
        "reasoning_summary_text.delta",
        "reasoning_summary_text.done",
        "reasoning_summary_part.done",
        "output_item.done",
    ]
    thoughts, _ = body(described, answer(*THINKING))["output"]
    assert thoughts["summary"] == [{"type": "summary_text", "text": "hm"}]
    assert "content" not in thoughts
    assert decode_thoughts(thoughts["encrypted_content"]) == "hm"


CALLS = (
    "Wait.",
    [ToolCall(0, "f"), ToolArguments(0, '{"a"')],
    [ToolArguments(0, ":1}"), ToolCall(1, "mcp__x__f"), ToolArguments(1, "{}")],
    [ToolCall(2, "run"), ToolArguments(2, '{"input": "a\\')],
    [ToolArguments(2, 'nb"}')],
)
TOOLS = [{"type": "function", "name": "f"}, SPACE, RUN]


def test_calls() -> None:
    """Of a function, of one in a namespace and of a custom tool, which gets its plain input."""
    data = stream(record(tools=TOOLS), answer(*CALLS, reason="tool_calls"))
    call = [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
    ]
    custom = [
        "output_item.added",
        *["custom_tool_call_input.delta"] * 2,
        "custom_tool_call_input.done",
        "output_item.done",
    ]
    assert kinds(data)[2:-1] == [
        *TEXT_EVENTS,
        "output_text.delta",
        *TEXT_END,
        *call[:2],
        *call[1:],
        *call,
        *custom,
    ]
    whole = body(record(tools=TOOLS), answer(*CALLS, reason="tool_calls"))
    message, f, g, run = whole["output"]
    assert message["content"][0]["text"] == "Wait."
    assert (f["name"], f["arguments"], "namespace" in f) == ("f", '{"a":1}', False)
    assert (g["name"], g["arguments"], g["namespace"]) == ("f", "{}", "mcp__x")
    assert (run["type"], run["name"], run["input"]) == ("custom_tool_call", "run", "a\nb")
    assert len({item.get("call_id") for item in whole["output"]}) == 4
    assert parsed(data)[-1]["response"] == whole


def test_a_custom_call_cut_before_its_input() -> None:
    """Its input is empty, in a stream as in a complete answer."""
    events = answer([ToolCall(0, "run"), ToolArguments(0, '{"inp')], reason="length")
    whole = body(record(tools=TOOLS), events)
    [run] = whole["output"]
    assert (run["status"], run["input"]) == ("incomplete", "")
    data = stream(record(tools=TOOLS), events)
    assert "custom_tool_call_input.delta" not in kinds(data)
    assert parsed(data)[-1]["response"] == whole


def test_logprobs() -> None:
    """With each delta, with the complete text, and in the part."""
    own = [TokenLogprob(i, -0.5, text) for i, text in enumerate([b"a", b"b"])]
    events: list[AnswerEvent] = [
        Delta(1, 0, "a", own[0], own),
        Delta(2, 1, "b", own[1], own),
        Finished(3, "stop", USAGE),
    ]
    described = record(top_logprobs=2)
    deltas = [e for e in parsed(stream(described, events)) if e["type"] == "response.output_text.delta"]
    assert [[item["token"] for item in delta["logprobs"]] for delta in deltas] == [["a"], ["b"]]
    [part] = body(described, events)["output"][0]["content"]
    assert [item["token"] for item in part["logprobs"]] == ["a", "b"]
    assert [len(item["top_logprobs"]) for item in part["logprobs"]] == [2, 2]


def test_a_failure() -> None:
    """The last event is `response.failed`, with the output so far; a cancelled response has a status of its own."""
    rendering = ResponseRendering(record())
    opened = rendering.opening() + rendering.frames(0, answer("Hel")[:-1])
    error = RequestError("Too long.", param="messages", code="context_length_exceeded")
    *_, last = parsed(opened + rendering.error(error))
    failed = last["response"]
    assert (last["type"], failed["status"]) == ("response.failed", "failed")
    assert failed["error"] == {"code": "context_length_exceeded", "message": "Too long."}
    assert (failed["output"][0]["status"], failed["usage"]) == ("incomplete", None)
    assert [str(fault) for fault in described_as("ResponseObject").iter_errors(failed)] == []
    cancelled = json.loads(rendering.failed_body(RequestError("x", status=503, code="cancelled")))
    assert (cancelled["status"], cancelled["error"]) == ("cancelled", None)


@pytest.mark.parametrize(
    ("status", "code"),
    [(500, "server_error"), (503, "server_error"), (429, "rate_limit_exceeded"), (400, "invalid_prompt")],
)
def test_codes_of_failures(status: int, code: str) -> None:
    """OpenAI's, if the error has none of its own."""
    failed = json.loads(ResponseRendering(record()).failed_body(RequestError("x", status=status)))
    assert failed["error"]["code"] == code


def test_keep_alive_is_an_event() -> None:
    """Codex's timer counts events; the number is the last one's, so the others do not change."""
    rendering = ResponseRendering(record())
    opened = rendering.opening()
    [event] = [
        json.loads(line[6:])
        for line in rendering.keep_alive().decode().split("\n")
        if line.startswith("data: ")
    ]
    assert (event["type"], event["sequence_number"]) == ("response.in_progress", 1)
    assert parsed(opened + rendering.frames(0, answer("a")[:-1]))[2]["sequence_number"] == 2


def test_unfinished_bodies() -> None:
    """A response in the background, while it waits and while it runs."""
    rendering = ResponseRendering(record())
    assert json.loads(rendering.unfinished_body("queued"))["output"] == []
    rendering.add(0, answer("Hel")[:-1])
    running = json.loads(rendering.unfinished_body("in_progress"))
    assert (running["status"], running["output"][0]["status"]) == ("in_progress", "in_progress")
    assert running["output"][0]["content"][0]["text"] == "Hel"


TEXTS = st.sampled_from(["", "a", "é", " b", "\n", '"', "\u2028"])


@st.composite
def journals(draw: st.DrawFn) -> list[AnswerEvent]:
    """Text, reasoning and calls of each kind in any order, with held-back text and log-probabilities."""
    events: list[AnswerEvent] = []
    held, num_calls = "", 0
    for text in draw(st.lists(TEXTS, max_size=8)):
        own, kind = (
            TokenLogprob(7, -0.5, text.encode()),
            draw(st.sampled_from(["text", "text", "reasoning", "call"])),
        )
        pieces: list[Piece] = [Reasoning("hm")] if kind == "reasoning" else []
        if kind == "call":
            name = draw(st.sampled_from(["f", "mcp__x__f", "run"]))
            pieces = [
                ToolCall(num_calls, name),
                ToolArguments(num_calls, '{"input": "x'),
                ToolArguments(num_calls, '"}'),
            ]
            num_calls += 1
        content = held + text
        held = content if kind == "text" and draw(st.booleans()) else ""
        events.append(Delta(len(events) + 1, 7, "" if held else content, own, [own], pieces))
    reason = draw(st.sampled_from(["stop", "length"]))
    events.append(Finished(len(events) + 1, reason, USAGE))
    return events


REQUESTS = st.sampled_from(
    [
        {},
        {"stream": True, "top_logprobs": 1},
        {"reasoning": {"summary": "auto"}, "include": ["reasoning.encrypted_content"]},
    ]
)


@given(journals(), REQUESTS, st.data())
def test_frames_do_not_depend_on_batches(events: list[AnswerEvent], fields: Any, data: st.DataObject) -> None:
    """However events are batched, a stream has the same bytes, and so has an object; both again from the same record."""
    described = record(tools=TOOLS, **fields)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(events)))) | {0, len(events)})
    batches = [events[start:end] for start, end in itertools.pairwise(cuts)]
    end = events[-1]
    assert isinstance(end, Finished)
    rendering = ResponseRendering(described)
    in_batches = rendering.opening() + b"".join(rendering.frames(0, batch) for batch in [[], *batches])
    assert in_batches + rendering.closing([end]) == stream(described, events)
    rendering = ResponseRendering(described)
    for batch in batches:
        rendering.add(0, batch)
    assert json.loads(rendering.body([end])) == body(described, events)


_EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


@given(journals(), REQUESTS)
def test_the_sdk_understands_each_stream(events: list[AnswerEvent], fields: Any) -> None:
    """By its types; its accumulated response is the complete one, and each event is as described."""
    described = record(tools=TOOLS, **fields)
    data = stream(described, events)
    schema = described_as("ResponseEvent")
    for event in parsed(data):
        assert [str(fault) for fault in schema.iter_errors(event)] == []
        _EVENTS.validate_python(event)
    if parsed(data)[-1]["type"] == "response.completed":
        final = accumulated(data)
        whole = body(described, events)
        assert [item.id for item in final.output] == [item["id"] for item in whole["output"]]
        assert final.output_text == Response.model_validate(whole).output_text


def test_a_response_in_the_background() -> None:
    """It is queued until its job's first event."""
    described = record()
    described.options["echo"] = {"background": True}
    rendering = ResponseRendering(described)
    data = rendering.opening()
    assert rendering.frames(0, []) == b""
    data += rendering.frames(0, answer("a")[:1]) + rendering.frames(0, answer("a")[1:])
    assert kinds(data)[:4] == ["created", "queued", "in_progress", "output_item.added"]
    assert [event["response"]["status"] for event in parsed(data)[:3]] == ["queued", "queued", "in_progress"]
