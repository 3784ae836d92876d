"""The wire format between versions: an old worker and a new API share a queue during an upgrade."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from common import names
from common.models.model_card import ModelCard
from common.protocol import (
    ChatPrompt,
    Delta,
    Failed,
    Finished,
    GenerationJob,
    SamplingParams,
    Started,
    TokenLogprob,
    Usage,
    decode_event,
    decode_step,
    encode,
)


@pytest.mark.parametrize(
    "event",
    [
        Started(0, 5, 2),
        Delta(1, 7, 'a"\n🌊', TokenLogprob(7, -0.5, b"\xf0"), [TokenLogprob(8, -1.5, b"x")]),
        Finished(2, "stop", Usage(5, 1)),
        Failed(1, "no", 400, "invalid_request_error", "prompt", "code", 1.5),
    ],
)
def test_events_round_trip(event: Any) -> None:
    """Events are decoded as they were encoded, alone and in a step's message."""
    assert decode_event(encode(event)) == event
    assert decode_step(b'[["job",' + encode(event) + b"]]") == [("job", event)]


def test_unknown_fields_are_ignored() -> None:
    """Fields of a newer version come last and are ignored."""
    assert decode_event(b'["d",1,7,"x",null,[],[],"new",{}]') == Delta(1, 7, "x")


def test_missing_fields_have_defaults() -> None:
    """Fields that an older version does not send have their defaults."""
    assert decode_event(b'["d",1,7]') == Delta(1, 7)
    assert decode_event(b'["s",0,5]') == Started(0, 5)


def test_a_job_survives_rqs_json() -> None:
    """Keyword arguments are encoded with the standard library's JSON, integer keys included."""
    job = GenerationJob(
        job_id="a",
        model="m",
        channel="c",
        prompt=ChatPrompt([{"role": "user", "content": "hi"}], {"user": "Q"}),
        sampling=SamplingParams(logit_bias={5: 1.5}, seed=2**63 - 1),
    )
    kwargs = json.loads(json.dumps(msgspec.to_builtins(job, str_keys=True)))
    assert msgspec.convert(kwargs | {"newer": 1}, GenerationJob, str_keys=True) == job


def test_a_card_is_a_hash_of_text() -> None:
    """A card is decoded from what Redis returns; an invalid one is refused."""
    card = ModelCard(
        id="org/m",
        worker="w",
        created=1,
        context_length=2,
        vocab_size=3,
        max_batch=4,
        free_slots=0,
        tokens_per_second=1.5,
    )
    fields = {key.encode(): value.encode() for key, value in card.to_hash().items()}
    assert ModelCard.from_hash(fields | {b"newer": b"1"}) == card
    for bad in ({b"free_slots": b"-1"}, {b"vocab_size": b"0"}, {b"id": b"a\nb"}, {b"id": b"a,b"}):
        with pytest.raises(msgspec.ValidationError):
            ModelCard.from_hash(fields | bad)


def test_names_are_distinct_and_documented() -> None:
    """No two names are equal, and the table in the module's docstring lists all of them."""
    makers = [names.journal, names.cancelled, names.api_channel, names.control_channel, names.worker_card]
    made = [maker("x") for maker in makers] + [names.WORKER_CARDS, names.KNOWN_MODELS]
    assert len(set(made)) == len(made)
    assert all(name.startswith("mlxpool:") for name in made)
    listed = names.__doc__ or ""
    assert all(f"| {maker.__name__}(" in listed for maker in makers)
    assert all(f"| {name} |" in listed for name in ("WORKER_CARDS", "KNOWN_MODELS"))
