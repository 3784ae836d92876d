"""A rendering depends on the record and the events, and on nothing else."""

from __future__ import annotations

import itertools
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.generation.front_end import AnswerEvent
from api.generation.request import AnswerRecord, answer_record
from api.openai.chat import request as chat_request
from api.openai.chat.rendering import ChatRendering
from api.openai.completions.rendering import CompletionRendering
from common.protocol import (
    Delta,
    Echo,
    Finished,
    GenerationJob,
    Piece,
    Reasoning,
    TokenLogprob,
    ToolArguments,
    ToolCall,
    Usage,
)
from tests.unit.api.openai.records import MODEL, record

TEXTS = st.sampled_from(["", "a", "é", " b", "\n", '"'])
KINDS = st.sampled_from(["none", "none", "reasoning", "call"])


@st.composite
def journals(draw: st.DrawFn) -> list[AnswerEvent]:
    """The events of one choice, with or without an echo, held-back text, pieces and log-probabilities."""
    events: list[AnswerEvent] = []
    if draw(st.booleans()):
        events.append(Echo(1, "x y", [TokenLogprob(1, 0.0, b"x"), TokenLogprob(2, -1.0, b" y")], [[], []]))
    held, num_calls = "", 0
    for text in draw(st.lists(TEXTS, max_size=8)):
        own, said, kind = TokenLogprob(7, -0.5, text.encode()), held + text, draw(KINDS)
        pieces: list[Piece] = [Reasoning("hm")] if kind == "reasoning" else []
        if kind == "call":
            pieces = [ToolCall(num_calls, "f"), ToolArguments(num_calls, "{}")]
            num_calls += 1
        held = said if draw(st.booleans()) else ""
        events.append(Delta(len(events) + 1, 7, "" if held else said, own, [own], pieces))
    events.append(Finished(len(events) + 1, "stop", Usage(2, len(events))))
    return events


@given(journals(), st.data())
@pytest.mark.parametrize("kind", [ChatRendering, CompletionRendering])
def test_frames_do_not_depend_on_batches(kind: Any, events: list[AnswerEvent], data: st.DataObject) -> None:
    """However events are batched, a stream has the same bytes, and so has an object."""
    described = record(with_logprobs=data.draw(st.booleans()), include_usage=data.draw(st.booleans()))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(events)))) | {0, len(events)})
    batches = [events[start:end] for start, end in itertools.pairwise(cuts)]
    at_once, in_batches = kind(described), kind(described)
    assert b"".join(in_batches.frames(0, batch) for batch in batches) == at_once.frames(0, events)
    at_once, in_batches = kind(described), kind(described)
    at_once.add(0, events)
    for batch in batches:
        in_batches.add(0, batch)
    ends = [event for event in events if isinstance(event, Finished)]
    assert in_batches.body(ends) == at_once.body(ends)


def jobs(**fields: Any) -> list[GenerationJob]:
    """A request's jobs."""
    body = {"messages": [{"role": "user", "content": "hi"}], "model": "alias"} | fields
    return chat_request.parse(json.dumps(body).encode()).jobs("openai.chat", MODEL, "c", [1], "ann")


def test_the_first_job_has_the_record() -> None:
    """It lists all jobs and how to answer, with the model's own name; the other jobs do not have it. All have the name of the API key."""
    made = jobs(n=3, stream=True, stream_options={"include_usage": True}, logprobs=True, service_tier="auto")
    described = answer_record(made[0])
    assert described == AnswerRecord(
        front_end="openai.chat",
        job_ids=[job.job_id for job in made],
        created=int(made[0].submitted_at),
        model=MODEL.id,
        fingerprint=described.fingerprint,
        stream=True,
        n=3,
        best_of=3,
        options={"include_usage": True, "service_tier": "default", "with_logprobs": True},
    )
    assert [job.answer for job in made[1:]] == [None, None]
    assert {job.api_key_name for job in made} == {"ann"}


def through_redis(job: Any) -> Any:
    """As RQ stores keyword arguments."""
    return json.loads(json.dumps(msgspec.to_builtins(job, str_keys=True)))


def test_the_record_survives_rqs_json() -> None:
    """The job that is read back renders the same."""
    [job] = jobs()
    again = msgspec.convert(through_redis(job), GenerationJob, str_keys=True)
    assert answer_record(again) == answer_record(job)
    events: list[AnswerEvent] = [Delta(1, 7, "a"), Finished(2, "stop", Usage(1, 1))]
    assert ChatRendering(answer_record(again)).frames(0, events) == ChatRendering(answer_record(job)).frames(
        0, events
    )


NEW_FIELDS = ("api_key_name", "answer")
OldJob = msgspec.defstruct(
    "OldJob",
    [
        (field.name, field.type, *([] if field.required else [field.default]))
        for field in msgspec.structs.fields(GenerationJob)
        if field.name not in NEW_FIELDS and field.default_factory is msgspec.NODEFAULT
    ],
    kw_only=True,
)


def test_an_old_worker_reads_a_new_job() -> None:
    """Unknown fields are ignored."""
    [job] = jobs()
    old = msgspec.convert(through_redis(job), OldJob, str_keys=True)
    assert not any(hasattr(old, name) for name in NEW_FIELDS)
    assert (old.job_id, old.prompt) == (job.job_id, job.prompt)


def test_a_new_worker_reads_an_old_job() -> None:
    """Fields that are missing have their defaults."""
    [job] = jobs()
    fields = through_redis(job)
    for name in NEW_FIELDS:
        del fields[name]
    read = msgspec.convert(fields, GenerationJob, str_keys=True)
    assert read == msgspec.structs.replace(job, api_key_name=None, answer=None)
