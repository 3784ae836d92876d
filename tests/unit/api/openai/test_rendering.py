"""Chunks and objects have the form of OpenAI's API reference."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from api.generation.front_end import AnswerEvent, Rendering, total_usage
from api.generation.request import fingerprint
from api.openai.chat.rendering import ChatRendering
from api.openai.completions.rendering import CompletionRendering
from common.protocol import Delta, Echo, Finished, Reasoning, Started, TokenLogprob, Usage
from tests.unit.api.openai.records import MODEL, record

USAGE = {
    "prompt_tokens": 3,
    "completion_tokens": 2,
    "total_tokens": 5,
    "prompt_tokens_details": {"cached_tokens": 1},
    "completion_tokens_details": {"reasoning_tokens": 0},
}
HEAD = {"created": 5, "model": "m/1", "system_fingerprint": "fp_1"}
EVENTS: list[AnswerEvent] = [
    Delta(1, 7, 'q"\n\u2028'),
    Delta(2, 8, ""),
    Finished(3, "stop", Usage(3, 2, 1)),
]


def frames(data: bytes) -> list[Any]:
    """A stream's frames, each checked to be one line and an empty one."""
    assert data.endswith(b"\n\n")
    parsed = []
    for frame in data[:-2].split(b"\n\n"):
        assert frame.startswith(b"data: ")
        assert b"\n" not in frame
        parsed.append("[DONE]" if frame == b"data: [DONE]" else json.loads(frame[6:]))
    return parsed


def last(events: list[AnswerEvent]) -> list[Finished]:
    return [event for event in events if isinstance(event, Finished)]


def streamed(rendering: Rendering, events: list[AnswerEvent]) -> bytes:
    return rendering.opening() + rendering.frames(0, events) + rendering.closing(last(events))


def choice(**fields: Any) -> dict[str, Any]:
    return {"index": 0, "logprobs": None, "finish_reason": None} | fields


def test_chat_stream() -> None:
    """The role first and alone, then text, an empty delta with the reason, [DONE] once; empty text makes no chunk."""
    rendering = ChatRendering(record())
    chunks = frames(streamed(rendering, EVENTS))
    deltas: list[dict[str, Any]] = [
        choice(delta={"role": "assistant", "content": "", "refusal": None}),
        choice(delta={"content": 'q"\n\u2028'}),
        choice(delta={}, finish_reason="stop"),
    ]
    head = HEAD | {"id": "chatcmpl-1", "object": "chat.completion.chunk"}
    assert chunks == [*(head | {"choices": [delta]} for delta in deltas), "[DONE]"]


def test_chat_stream_with_usage() -> None:
    """Null in all chunks but the last, which has no choices."""
    rendering = ChatRendering(record(include_usage=True))
    *chunks, last, done = frames(streamed(rendering, EVENTS))
    assert [chunk["usage"] for chunk in chunks] == [None] * 3
    assert (last["choices"], last["usage"]) == ([], USAGE)
    assert done == "[DONE]"


@pytest.mark.parametrize("in_one_burst", [True, False])
def test_chat_stream_with_logprobs(in_one_burst: bool) -> None:
    """Items are sent with their text, whether events arrive together or one by one."""
    own = [TokenLogprob(1, -1.0, b"a"), TokenLogprob(2, -2.0, b"b"), TokenLogprob(3, -3.0, b"cd")]
    events: list[AnswerEvent] = [
        Delta(1, 1, "", own[0], [own[0]]),
        Delta(2, 2, "ab", own[1]),
        Delta(3, 3, "c", own[2]),
        Finished(4, "stop", Usage(3, 3)),
    ]
    rendering = ChatRendering(record(with_logprobs=True))
    bursts = [events] if in_one_burst else [[event] for event in events]
    chunks = frames(
        b"".join(rendering.frames(0, burst) for burst in bursts) + rendering.closing(last(events))
    )[:-1]
    texts = [chunk["choices"][0]["delta"].get("content") for chunk in chunks]
    tokens = [
        [item["token"] for item in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
        for chunk in chunks
    ]
    assert texts == ["ab", "c", "", None]
    assert tokens == [["a", "b"], [], ["c"], []]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_chat_object() -> None:
    """One object with all its fields, null if they do not apply."""
    rendering = ChatRendering(record())
    rendering.add(0, EVENTS[:2])
    rendering.add(0, EVENTS[2:])
    message = {"role": "assistant", "content": 'q"\n\u2028', "refusal": None}
    assert json.loads(rendering.body([Finished(3, "length", Usage(3, 2, 1))])) == HEAD | {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "choices": [choice(message=message, finish_reason="length")],
        "usage": USAGE,
    }


def test_chat_object_with_logprobs() -> None:
    """The items of the complete answer."""
    rendering = ChatRendering(record(with_logprobs=True))
    rendering.add(
        0, [Delta(1, 1, "", TokenLogprob(1, -1.0, b"a")), Delta(2, 2, "ab", TokenLogprob(2, -2.0, b"bc"))]
    )
    body = json.loads(rendering.body([Finished(3, "stop", Usage(3, 2))]))
    content = body["choices"][0]["logprobs"]["content"]
    assert [(item["token"], item["bytes"], item["logprob"]) for item in content] == [
        ("a", [97], -1.0),
        ("b", [98], -2.0),
    ]


def test_log_probabilities_of_no_token() -> None:
    """If requested, they are a list, which is empty if a stop string or the end came first."""
    rendering = ChatRendering(record(with_logprobs=True))
    body = json.loads(rendering.body([Finished(1, "stop", Usage(3, 1))]))
    assert body["choices"][0]["logprobs"] == {"content": [], "refusal": None}


def test_completion_stream() -> None:
    """Text, then the reason without text, then [DONE]."""
    rendering = CompletionRendering(record(include_usage=True))
    *chunks, last, done = frames(streamed(rendering, EVENTS))
    head = HEAD | {"id": "cmpl-1", "object": "text_completion", "usage": None}
    assert chunks == [
        head | {"choices": [choice(text='q"\n\u2028')]},
        head | {"choices": [choice(text="", finish_reason="stop")]},
    ]
    assert (last["choices"], last["usage"], done) == ([], USAGE, "[DONE]")


def test_completion_object_and_stream_have_the_same_logprobs() -> None:
    """The arrays of all chunks together are those of the object, with continuous offsets."""
    events: list[AnswerEvent] = [
        Delta(1, 1, "ab", TokenLogprob(1, -1.0, b"ab")),
        Delta(2, 2, "", TokenLogprob(2, -2.0, b"c")),
        Delta(3, 3, "cd", TokenLogprob(3, -3.0, b"de")),
    ]
    finished = Finished(4, "stop", Usage(3, 3))
    whole = CompletionRendering(record(with_logprobs=True))
    whole.add(0, events)
    expected = json.loads(whole.body([finished]))["choices"][0]["logprobs"]
    assert expected == {
        "tokens": ["ab", "c", "d"],
        "token_logprobs": [-1.0, -2.0, -3.0],
        "top_logprobs": [{"ab": -1.0}, {"c": -2.0}, {"d": -3.0}],
        "text_offset": [0, 2, 3],
    }
    stream = CompletionRendering(record(with_logprobs=True))
    chunks = frames(stream.frames(0, [*events, finished]))
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"][0]["logprobs"]]
    assert {name: [x for part in parts for x in part[name]] for name in expected} == expected


def test_service_tier_is_included_if_it_was_asked_for() -> None:
    """And in no other answer, in each chunk and in an object."""
    for options, expected in (({"service_tier": "default"}, "default"), ({}, None)):
        body = json.loads(ChatRendering(record(**options)).body([Finished(1, "stop", Usage(3, 1))]))
        [chunk] = frames(ChatRendering(record(**options)).opening())
        assert body.get("service_tier") == chunk.get("service_tier") == expected


def test_the_fingerprint_is_the_models() -> None:
    """It stays the same for a model, and differs between two models or quantizations."""
    other_id = msgspec.structs.replace(MODEL, id="other")
    other_bits = msgspec.structs.replace(MODEL, quantization="8-bit")
    assert fingerprint(MODEL) == fingerprint(msgspec.structs.replace(MODEL, free_slots=0))
    assert len({fingerprint(MODEL), fingerprint(other_id), fingerprint(other_bits)}) == 3


def test_choices_of_a_chat() -> None:
    """Each has its index and its role, chunks are in the order of events, the end is sent once, and all choices are counted."""
    rendering = ChatRendering(record(2, include_usage=True))
    ends = [Finished(2, "stop", Usage(3, 1, 2)), Finished(2, "length", Usage(3, 4))]
    data = rendering.opening() + rendering.frames(1, [Delta(1, 7, "b")])
    data += rendering.frames(0, [Delta(1, 7, "a"), ends[0]]) + rendering.frames(1, [ends[1]])
    *chunks, usage, done = frames(data + rendering.closing(ends))
    seen = [
        (c["choices"][0]["index"], c["choices"][0]["delta"].get("content"), c["choices"][0]["finish_reason"])
        for c in chunks
    ]
    assert seen == [
        (0, "", None),
        (1, "", None),
        (1, "b", None),
        (0, "a", None),
        (0, None, "stop"),
        (1, None, "length"),
    ]
    assert (usage["choices"], done) == ([], "[DONE]")
    assert (usage["usage"]["prompt_tokens"], usage["usage"]["completion_tokens"]) == (3, 5)
    whole = ChatRendering(record(2))
    whole.add(1, [Delta(1, 7, "b")])
    whole.add(0, [Delta(1, 7, "a")])
    body = json.loads(whole.body(ends))
    assert [(c["index"], c["message"]["content"], c["finish_reason"]) for c in body["choices"]] == [
        (0, "a", "stop"),
        (1, "b", "length"),
    ]
    assert body["usage"] == usage["usage"]


def test_the_best_of_several() -> None:
    """For each prompt, the choices with the highest mean log-probability are shown and renumbered; all tokens are counted."""
    rendering = CompletionRendering(record(6, n=2, best_of=3))
    likely = [-3.0, -1.0, -2.0, -1.0, -2.0, -3.0]
    for index, logprob in enumerate(likely):
        deltas: list[AnswerEvent] = [
            Delta(n, 7, f"{index}", TokenLogprob(7, logprob, b"x")) for n in range(1, 2 + index % 2)
        ]
        rendering.add(index, deltas)
    body = json.loads(rendering.body([Finished(9, "stop", Usage(3 + i // 3, 2)) for i in range(6)]))
    assert [(c["index"], c["text"][0], c["logprobs"]) for c in body["choices"]] == [
        (0, "1", None),
        (1, "2", None),
        (2, "3", None),
        (3, "4", None),
    ]
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (7, 12)


@pytest.mark.parametrize("with_logprobs", [True, False])
def test_an_echo(with_logprobs: bool) -> None:
    """The prompt precedes the text, with its tokens, the first without a log-probability; offsets continue."""
    tokens = [TokenLogprob(1, 0.0, b"\xc3"), TokenLogprob(2, -1.0, b"\xa9"), TokenLogprob(3, -2.0, b" b")]
    echo = Echo(1, "é b", tokens, [[], [TokenLogprob(2, -1.0, b"\xa9")], [TokenLogprob(4, -0.5, b" c")]])
    events: list[AnswerEvent] = [
        echo if with_logprobs else Echo(1, "é b"),
        Delta(2, 5, "!", TokenLogprob(5, -0.1, b"!")),
    ]
    finished = Finished(3, "length", Usage(3, 1))
    whole = CompletionRendering(record(with_logprobs=with_logprobs))
    whole.add(0, events)
    [answer] = json.loads(whole.body([finished]))["choices"]
    assert answer["text"] == "é b!"
    stream = CompletionRendering(record(with_logprobs=with_logprobs))
    chunks = [c["choices"][0] for c in frames(stream.frames(0, [*events, finished]))]
    assert "".join(c["text"] for c in chunks) == "é b!"
    if not with_logprobs:
        assert answer["logprobs"] is None
        return
    assert answer["logprobs"]["tokens"] == ["", "é", " b", "!"]
    assert answer["logprobs"]["token_logprobs"] == [None, -1.0, -2.0, -0.1]
    assert answer["logprobs"]["text_offset"] == [0, 0, 1, 3]
    assert answer["logprobs"]["top_logprobs"][0] is None
    assert answer["logprobs"]["top_logprobs"][2] == {" c": -0.5, " b": -2.0}
    parts = [c["logprobs"] for c in chunks if c["logprobs"]]
    assert {k: [x for part in parts for x in part[k]] for k in answer["logprobs"]} == answer["logprobs"]


def test_each_prompt_counts_once() -> None:
    """One of a prompt's choices prefills it, not always the first: its number of cached tokens counts."""
    ends = [Finished(1, "stop", Usage(10, 2, cached)) for cached in (9, 0, 9, 9, 9, 9)]
    assert total_usage(ends, 3) == Usage(20, 12, 9)


STARTED = Started(1, 3, 1)


@pytest.mark.parametrize("kind", [ChatRendering, CompletionRendering])
@pytest.mark.parametrize("in_one_burst", [True, False])
def test_usage_in_each_chunk(kind: Any, in_one_burst: bool) -> None:
    """The choice's counts so far in each chunk, the exact ones in its last, and the request's at the end if asked for."""
    rendering: Rendering = kind(record(include_usage=True, continuous_usage=True))
    events: list[Any] = [STARTED, Delta(2, 7, "a"), Delta(3, 8, "b"), Finished(4, "stop", Usage(3, 3, 1))]
    bursts = [events] if in_one_burst else [[event] for event in events]
    data = b"".join(rendering.frames(0, burst) for burst in bursts)
    *chunks, end, done = frames(data + rendering.closing(last(events)))
    usages = [chunk["usage"] for chunk in chunks]
    assert [(u["prompt_tokens"], u["completion_tokens"], u["total_tokens"]) for u in usages] == [
        (3, 1, 4),
        (3, 2, 5),
        (3, 3, 6),
    ]
    assert (end["choices"], end["usage"]["completion_tokens"], done) == ([], 3, "[DONE]")


@pytest.mark.parametrize("kind", [ChatRendering, CompletionRendering])
def test_usage_in_each_chunk_of_an_older_worker(kind: Any) -> None:
    """It does not report the prompt's length at the beginning: the counts are null until the end."""
    rendering: Rendering = kind(record(continuous_usage=True))
    events: list[AnswerEvent] = [Delta(1, 7, "a"), Finished(2, "stop", Usage(3, 1, 1))]
    first, final, done = frames(rendering.frames(0, events) + rendering.closing(last(events)))
    assert (first["usage"], final["usage"]["prompt_tokens"], done) == (None, 3, "[DONE]")


def test_reasoning_that_is_left_out() -> None:
    """Neither in chunks nor in the message; the answer after it is."""
    events: list[AnswerEvent] = [
        Delta(1, 7, "", pieces=[Reasoning("hm")]),
        Delta(2, 8, "a"),
        Finished(3, "stop", Usage(3, 2, 1)),
    ]
    text = ChatRendering(record(hides_reasoning=True)).frames(0, events)
    assert [chunk["choices"][0]["delta"] for chunk in frames(text)] == [{"content": "a"}, {}]
    rendering = ChatRendering(record(hides_reasoning=True))
    rendering.add(0, events)
    message = json.loads(rendering.body(last(events)))["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "a", "refusal": None}
