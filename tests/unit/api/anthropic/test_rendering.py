"""Messages and the events of streams, as Anthropic's clients read them."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.anthropic import answer_types
from api.anthropic.messages import signature
from api.anthropic.messages.rendering import PING, MessageRendering
from api.generation.request import AnswerRecord
from common.errors import unavailable
from common.protocol import (
    Delta,
    Finished,
    Piece,
    Reasoning,
    Started,
    ToolArguments,
    ToolCall,
    Usage,
)

STARTED = Started(1, 12, 5)
_event = msgspec.json.Decoder(answer_types.StreamEvent)
_message = msgspec.json.Decoder(answer_types.AnswerMessage)


def record(**options: Any) -> AnswerRecord:
    return AnswerRecord(
        front_end="anthropic.messages",
        job_ids=["1f"],
        created=5,
        model="m/1",
        fingerprint="fp_1",
        options=options,
    )


def journal(*parts: str | list[Piece], reason: Any = "stop", stop: str | None = None) -> list[Any]:
    """The events of an answer: a text or pieces for each token."""
    deltas = [
        Delta(i + 2, 7, part) if isinstance(part, str) else Delta(i + 2, 7, "", pieces=part)
        for i, part in enumerate(parts)
    ]
    usage = Usage(12, len(parts), 5, 1)
    return [STARTED, *deltas, Finished(len(parts) + 2, reason, usage, stop)]


def streamed(events: list[Any], **options: Any) -> list[Any]:
    """The events of a stream as objects, each checked to have its name and to be of its type, without other fields."""
    rendering = MessageRendering(record(**options))
    data = rendering.opening() + rendering.frames(0, events) + rendering.closing([events[-1]])
    objects = []
    for frame in data.removesuffix(b"\n\n").split(b"\n\n"):
        name, _, line = frame.decode().partition("\n")
        parsed = json.loads(line.removeprefix("data: "))
        assert name == f"event: {parsed['type']}"
        assert msgspec.to_builtins(_event.decode(json.dumps(parsed))) == parsed
        objects.append(parsed)
    return objects


def complete(events: list[Any], **options: Any) -> Any:
    """The message as an object, checked to be of its type, without other fields."""
    rendering = MessageRendering(record(**options))
    rendering.add(0, events)
    body = json.loads(rendering.body([events[-1]]))
    assert msgspec.to_builtins(_message.decode(json.dumps(body))) == body
    return body


def accumulated(events: list[Any]) -> Any:
    """The message that a client builds from the events of a stream, as the SDKs do (anthropic 2.14)."""
    message: Any = None
    inputs: dict[int, str] = {}
    for event in events:
        match event["type"]:
            case "message_start":
                message = event["message"]
            case "content_block_start":
                assert event["index"] == len(message["content"])
                message["content"].append(event["content_block"])
            case "content_block_delta":
                block, delta = message["content"][event["index"]], event["delta"]
                match delta["type"]:
                    case "input_json_delta":
                        inputs[event["index"]] = inputs.get(event["index"], "") + delta["partial_json"]
                        block["input"] = json.loads(inputs[event["index"]] or "{}")
                    case "signature_delta":
                        block["signature"] = delta["signature"]
                    case kind:
                        key = kind.removesuffix("_delta")
                        block[key] += delta[key]
            case "message_delta":
                message |= event["delta"]
                message["usage"] |= event["usage"]
    return message


CALL: list[Piece] = [ToolCall(0, "f"), ToolArguments(0, '{"a":1}')]
ANSWERS: list[tuple[list[Any], dict[str, Any]]] = [
    (journal("Hel", "", "lo"), {}),
    (journal(), {}),
    (journal("a", stop="END"), {}),
    (journal("a", "b", reason="length"), {"max_tokens": 2}),
    (journal("Look", CALL, [ToolCall(1, "g")], [ToolArguments(1, "{}")], reason="tool_calls"), {}),
    (journal([Reasoning("hm")], [Reasoning(" so")], "Yes", CALL, reason="tool_calls"), {"thinking": "shown"}),
    (journal([Reasoning("hm")], [Reasoning(" so")], "Yes"), {"thinking": "omitted"}),
    (journal([Reasoning("hm")], [Reasoning(" so")], "Yes"), {}),
    (journal([ToolCall(0, "f"), ToolCall(1, "f")], reason="tool_calls"), {}),
]


@pytest.mark.parametrize(("events", "options"), ANSWERS)
def test_a_stream_adds_up_to_the_complete_message(events: list[Any], options: dict[str, Any]) -> None:
    """The SDKs' way of adding up events gives the object that a request without a stream gets."""
    assert accumulated(streamed(events, **options)) == complete(events, **options)


def test_the_events_of_a_text() -> None:
    """In Anthropic's order, with a ping after the first; the first has the prompt's token count, cached tokens apart."""
    events = streamed(journal("Hel", "", "lo"))
    assert [event["type"] for event in events] == [
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    message = events[0]["message"]
    assert (message["id"], message["model"], message["stop_reason"]) == ("msg_1f", "m/1", None)
    counts = {name: value for name, value in message["usage"].items() if name.endswith("put_tokens")}
    assert counts == {
        "input_tokens": 7,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 5,
        "output_tokens": 0,
    }
    assert events[3]["delta"] == {"type": "text_delta", "text": "Hel"}
    assert events[-2]["delta"]["stop_reason"] == "end_turn"
    assert (events[-2]["usage"]["input_tokens"], events[-2]["usage"]["output_tokens"]) == (7, 3)


def test_the_first_event_comes_before_the_first_token() -> None:
    """As soon as the prompt was accepted."""
    rendering = MessageRendering(record())
    assert rendering.opening() == b""
    assert rendering.frames(0, [STARTED]).startswith(b"event: message_start\n")  # type: ignore[list-item]
    assert rendering.frames(0, [Delta(2, 7, "a")]).startswith(b"event: content_block_start\n")


def test_the_worker_is_older() -> None:
    """Without `Started` in the journal, the stream begins with the first token, and its end has the counts."""
    events = streamed(journal("a")[1:])
    assert [event["type"] for event in events][:3] == ["message_start", "ping", "content_block_start"]
    assert events[0]["message"]["usage"]["input_tokens"] == 0
    assert events[-2]["usage"]["input_tokens"] == 7
    assert accumulated(events) == complete(journal("a")[1:])


@pytest.mark.parametrize(
    ("reason", "stop", "max_tokens", "expected"),
    [
        ("stop", None, 9, ("end_turn", None)),
        ("stop", "END", 9, ("stop_sequence", "END")),
        ("length", None, 1, ("max_tokens", None)),
        ("length", None, 9, ("model_context_window_exceeded", None)),
        ("length", None, None, ("model_context_window_exceeded", None)),
        ("tool_calls", None, 9, ("tool_use", None)),
        ("tool_calls", "END", 9, ("tool_use", None)),
    ],
)
def test_why_it_stopped(reason: Any, stop: str | None, max_tokens: int | None, expected: Any) -> None:
    """Anthropic's reasons; fewer tokens than allowed mean that the context is full."""
    body = complete(journal("a", reason=reason, stop=stop), max_tokens=max_tokens)
    assert (body["stop_reason"], body["stop_sequence"]) == expected


def test_thoughts() -> None:
    """Shown with a signature; or without their text, which the signature then carries; or not at all, but counted."""
    events = journal([Reasoning("hm")], [Reasoning(" so")], "Yes")
    shown = complete(events, thinking="shown")["content"]
    assert [block["type"] for block in shown] == ["thinking", "text"]
    assert shown[0]["thinking"] == "hm so"
    assert shown[0]["signature"]
    assert signature.thoughts(shown[0]["signature"]) == ""
    omitted = complete(events, thinking="omitted")["content"]
    assert omitted[0]["thinking"] == ""
    assert signature.thoughts(omitted[0]["signature"]) == "hm so"
    hidden = complete(events)
    assert [block["type"] for block in hidden["content"]] == ["text"]
    assert hidden["usage"]["output_tokens_details"] == {"thinking_tokens": 1}
    assert hidden["usage"]["output_tokens"] == 3


def test_calls() -> None:
    """Ids differ between calls and are the same in every rendering; a call that was cut has an object as its input too."""
    events = journal([ToolCall(0, "f"), ToolArguments(0, '{"a": '), ToolCall(1, "f")], reason="length")
    blocks = complete(events)["content"]
    assert complete(events)["content"] == blocks
    assert blocks[0]["id"] != blocks[1]["id"]
    assert all(block["id"].startswith("toolu_") and len(block["id"]) == 30 for block in blocks)
    assert [block["input"] for block in blocks] == [{"INVALID_JSON": '{"a": '}, {}]


def test_the_end_of_a_stream_that_fails() -> None:
    """An error event, without the end of the open block, as Anthropic sends it."""
    frame = MessageRendering(record()).error(unavailable("Later."))
    assert frame.startswith(b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error"')


def test_silence() -> None:
    """Clients expect events, not comments."""
    assert MessageRendering(record()).keep_alive() == PING == b'event: ping\ndata: {"type":"ping"}\n\n'


KINDS = st.sampled_from(["text", "text", "", "reasoning", "call", "mixed"])


@st.composite
def journals(draw: st.DrawFn) -> list[Any]:
    """The events of an answer with text, thoughts and calls in any order."""
    events: list[Any] = [STARTED] if draw(st.booleans()) else []
    num_calls = 0
    for kind in draw(st.lists(KINDS, max_size=8)):
        pieces: list[Piece] = []
        if kind in ("reasoning", "mixed"):
            pieces.append(Reasoning("hm"))
        if kind in ("call", "mixed"):
            pieces += [ToolCall(num_calls, "f"), ToolArguments(num_calls, "{}")]
            num_calls += 1
        text = 'é"\n' if kind in ("text", "mixed") else ""
        events.append(Delta(len(events) + 1, 7, text, pieces=pieces))
    return [*events, Finished(len(events) + 1, "stop", Usage(2, len(events)))]


@given(journals(), st.sampled_from(["shown", "omitted", "hidden"]), st.data())
def test_frames_do_not_depend_on_batches(events: list[Any], display: str, data: st.DataObject) -> None:
    """However events are batched, the bytes are the same; and the stream adds up to the complete message."""
    whole = MessageRendering(record(thinking=display)).frames(0, events)
    rendering = MessageRendering(record(thinking=display))
    cut = data.draw(st.integers(0, len(events)))
    assert rendering.frames(0, events[:cut]) + rendering.frames(0, events[cut:]) == whole
    assert accumulated(streamed(events, thinking=display)) == complete(events, thinking=display)
