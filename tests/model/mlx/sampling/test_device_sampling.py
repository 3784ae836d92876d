"""The engine with the sampler of GPUs, on the real demo model: each sequence gets the tokens and the log-probabilities that it gets alone, and with NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.protocol import ChatPrompt, GenerationJob, SamplingParams, TextPrompt, TokenLogprob
from common.schema import grammar
from common.settings import Settings
from worker.loop.engine import PromptEcho, SequenceFailure, StepToken
from worker.mlx.engine import MLXEngine

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "kind": {"enum": ["cat", "dog"]}},
    "required": ["name", "kind"],
    "additionalProperties": False,
}
GREEDY = SamplingParams(temperature=0)
PENALIZED = SamplingParams(
    temperature=0.9, seed=4, presence_penalty=1.5, frequency_penalty=0.8, repetition_penalty=1.2
)
ALL = SamplingParams(
    temperature=0.8,
    top_p=0.95,
    seed=5,
    frequency_penalty=0.4,
    logit_bias={198: -100.0, 30: 3.0},
    min_tokens=4,
)
SETTINGS: dict[str, Any] = {"max_batch": 8, "prompt_cache_gb": 0}


@pytest.fixture(scope="module")
def device(demo_folder: Path) -> MLXEngine:
    return MLXEngine(Settings(model=str(demo_folder), **SETTINGS), samples_on_device=True)


@pytest.fixture(scope="module")
def host(demo_folder: Path) -> MLXEngine:
    return MLXEngine(Settings(model=str(demo_folder), **SETTINGS), samples_on_device=False)


def job(job_id: str, prompt: Any = None, **fields: Any) -> GenerationJob:
    prompt = prompt or ChatPrompt([{"role": "user", "content": f"Count from {job_id}: one two one two"}])
    fields = {"max_tokens": 12, "sampling": GREEDY} | fields
    return GenerationJob(job_id=job_id, model="m", channel="c", prompt=prompt, **fields)


def jobs() -> list[GenerationJob]:
    """Chats and legacy completions with every kind of sampling, and log-probabilities with all of them."""
    held = grammar.for_json_schema(SCHEMA)
    return [
        job("greedy"),
        job("reported", top_logprobs=20, max_tokens=7),
        job("penalized", sampling=PENALIZED, top_logprobs=3, max_tokens=16),
        job("held", sampling=ALL, grammar=held, top_logprobs=2, max_tokens=40),
        job("XTC", sampling=SamplingParams(seed=3, xtc_probability=0.5, xtc_threshold=0.05), top_logprobs=0),
        job("echo", TextPrompt("The capital of France is"), echo=True, top_logprobs=5, sampling=PENALIZED),
        job("legacy", TextPrompt("one two one two"), sampling=ALL, top_logprobs=1, max_tokens=5),
    ]


def run(
    engine: MLXEngine, *asked: GenerationJob, replay: list[int] | None = None, stagger: bool = False
) -> dict[str, list[StepToken | PromptEcho]]:
    """The events of all jobs; with `stagger`, one job joins in each step."""
    events: dict[str, list[StepToken | PromptEcho]] = {each.job_id: [] for each in asked}
    waiting = list(asked)
    while waiting or engine.num_sequences:
        for each in waiting[: 1 if stagger else len(waiting)]:
            engine.insert(each, engine.encode(each), replay or [])
            waiting.remove(each)
        for event in engine.step():
            assert not isinstance(event, SequenceFailure), event
            events[event.job_id].append(event)
    return events


def token_ids(events: list[StepToken | PromptEcho]) -> list[int]:
    return [event.token_id for event in events if isinstance(event, StepToken)]


def logprobs(events: list[StepToken | PromptEcho]) -> list[float]:
    """All log-probabilities of an answer and its echo, in order."""
    found: list[TokenLogprob] = []
    for event in events:
        if isinstance(event, PromptEcho):
            found += [*event.tokens, *(token for top in event.tops for token in top)]
        elif event.logprob is not None:
            found += [event.logprob, *event.top]
    return [each.logprob for each in found]


@pytest.mark.heavy
def test_any_batch_and_either_sampler(device: MLXEngine, host: MLXEngine) -> None:
    """All together, joining one by one and each alone, and with NumPy: the same tokens and log-probabilities."""
    together = run(device, *jobs())
    others = [
        run(device, *jobs(), stagger=True),
        {each.job_id: run(device, each)[each.job_id] for each in jobs()},
        run(host, *jobs(), stagger=True),
    ]
    for each in jobs():
        events = together[each.job_id]
        for other in others:
            assert token_ids(other[each.job_id]) == token_ids(events), each.job_id
            assert logprobs(other[each.job_id]) == pytest.approx(logprobs(events), rel=1e-3, abs=2e-3)
    assert all(logprobs(together[each.job_id]) for each in jobs()[1:])
    assert len({tuple(token_ids(events)) for events in together.values()}) >= len(jobs()) - 1


@pytest.mark.heavy
def test_a_penalized_sequence_while_others_come_and_go(device: MLXEngine) -> None:
    """In each step another sequence joins or leaves: the penalties count the same tokens."""
    penalized = job("penalized", sampling=PENALIZED, max_tokens=30, top_logprobs=1)
    alone = run(device, penalized)["penalized"]
    device.insert(penalized, device.encode(penalized), [])
    found: list[StepToken | PromptEcho] = []
    number = 0
    while len(found) < len(alone):
        if device.num_sequences < 6:
            number += 1
            passing = job(
                f"{number}",
                max_tokens=1 + number % 3,
                sampling=PENALIZED if number % 2 else GREEDY,
                top_logprobs=number % 4 or None,
            )
            device.insert(passing, device.encode(passing), [])
        found += [event for event in device.step() if event.job_id == "penalized"]  # type: ignore[misc]
    assert token_ids(found) == token_ids(alone)
    assert logprobs(found) == pytest.approx(logprobs(alone), rel=1e-3, abs=2e-3)
    assert number > 20
    for each in list(device._running):
        device.remove(each)


@pytest.mark.parametrize("number", [2, pytest.param(3, marks=pytest.mark.heavy)])
def test_a_takeover(device: MLXEngine, number: int) -> None:
    """After replaying the first tokens, penalties, grammars and draws continue as without an interruption."""
    asked = jobs()[number]
    complete = token_ids(run(device, asked)[asked.job_id])
    for num_replayed in (1, len(complete) // 2, len(complete) - 1):
        rest = run(device, asked, replay=complete[:num_replayed])[asked.job_id]
        assert complete[:num_replayed] + token_ids(rest) == complete


class Failing:
    """A matcher that raises after some tokens."""

    is_open = False

    def __init__(self, part: str) -> None:
        self._part = part
        self._num_calls = 0

    def _called(self, part: str) -> None:
        self._num_calls += part == self._part
        if self._num_calls > 2:
            raise ValueError("bad sequence")

    def advance(self, _token_id: int) -> None:
        self._called("advance")

    def fill(self, words: Any) -> None:
        self._called("fill")
        words[:] = 0xFFFFFFFF


@pytest.mark.parametrize("part", ["advance", "fill"])
def test_a_bad_matcher_fails_its_sequence_alone(
    device: MLXEngine, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """The other sequence's tokens are those that it has alone."""
    good, bad = job("good", sampling=PENALIZED, top_logprobs=1), job("bad", max_tokens=50)
    alone = run(device, good)["good"]
    device.insert(good, device.encode(good), [])
    with monkeypatch.context() as patched:
        patched.setattr(device._builder, "_matcher", lambda *_: Failing(part))
        device.insert(bad, device.encode(bad), [])
    events = [event for _ in range(20) for event in device.step()]
    failures = [event for event in events if isinstance(event, SequenceFailure)]
    assert [(failure.job_id, str(failure.error)) for failure in failures] == [("bad", "bad sequence")]
    found = [event for event in events if isinstance(event, StepToken) and event.job_id == "good"]
    assert [event.token_id for event in found] == token_ids(alone)
    assert device.num_sequences == 0
