"""The engine on the real demo model: a sequence samples the same tokens whatever else is in the batch, and after a takeover."""

from __future__ import annotations

import gc
import math
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.models.cache import ChunkedKVCache

from common.errors import RequestError, StartupError
from common.machine import memory_claims
from common.protocol import ChatPrompt, GenerationJob, SamplingParams, TextPrompt, TokenPrompt
from common.settings import Settings
from worker.loop.engine import SequenceFailure, StepToken
from worker.mlx import generation
from worker.mlx.caches import kinds as kv
from worker.mlx.engine import MLXEngine
from worker.mlx.sampling.host_sampler import guarded

GREEDY = SamplingParams(temperature=0)
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def engine(demo_folder: Path) -> MLXEngine:
    return MLXEngine(Settings(model=str(demo_folder), max_batch=8, prefill_step_tokens=64))


def chat(job_id: str, text: str = QUESTION, max_tokens: int = 12, **job: Any) -> GenerationJob:
    prompt = ChatPrompt([{"role": "user", "content": text}])
    job.setdefault("sampling", GREEDY)
    return GenerationJob(job_id=job_id, model="m", channel="c", prompt=prompt, max_tokens=max_tokens, **job)


def run(
    engine: MLXEngine, *jobs: GenerationJob, replay: dict[str, list[int]] | None = None
) -> dict[str, list[StepToken]]:
    """Run all jobs in one batch; returns the tokens of each."""
    tokens: dict[str, list[StepToken]] = {}
    for job in jobs:
        tokens[job.job_id] = []
        engine.insert(job, engine.encode(job), (replay or {}).get(job.job_id, []))
    while engine.num_sequences:
        for token in engine.step():
            tokens[token.job_id].append(token)
    return tokens


def text(tokens: list[StepToken]) -> str:
    return "".join(token.text for token in tokens)


def ids(tokens: list[StepToken]) -> list[int]:
    return [token.token_id for token in tokens]


def test_the_known_answer(engine: MLXEngine) -> None:
    """Greedy decoding gives the known answer; the end-of-text token ends it and has no text."""
    tokens = run(engine, chat("a"))["a"]
    assert text(tokens) == "The capital of France is Paris."
    assert [token.finish_reason for token in tokens][-2:] == [None, "stop"]


def test_max_tokens_is_exact(engine: MLXEngine) -> None:
    """Exactly `max_tokens` tokens if nothing else ends the answer; the last one has the finish reason."""
    for max_tokens in (1, 5):
        tokens = run(engine, chat("a", max_tokens=max_tokens))["a"]
        assert len(tokens) == max_tokens
        assert tokens[-1].finish_reason == "length"


def test_an_answer_that_is_already_complete(engine: MLXEngine) -> None:
    """An answer that other workers have generated up to this worker's limit, or beyond, is accepted and leaves no sequence."""
    job = chat("a", max_tokens=3)
    for num_answer_tokens in (3, 5):
        inserted = engine.insert(job, engine.encode(job), [28] * num_answer_tokens)
        assert (inserted.max_tokens, len(inserted.replayed_texts)) == (3, num_answer_tokens)
        assert engine.num_sequences == 0


def test_a_batch_equals_one_after_another(engine: MLXEngine) -> None:
    """Greedy sequences generate the same tokens in a batch as alone (float32), whatever their lengths."""
    jobs = [chat(str(i), f"Tell me about {'the number ' * i}{i}.", max_tokens=5 + i) for i in range(4)]
    together = run(engine, *jobs)
    for job in jobs:
        assert ids(run(engine, job)[job.job_id]) == ids(together[job.job_id])


def test_seeds_repeat_in_any_batch(engine: MLXEngine) -> None:
    """A seed samples the same tokens alone and in a batch with greedy sequences and other seeds; another seed samples others."""
    sampling = SamplingParams(temperature=1.2, top_p=0.95, seed=3)
    alone = ids(run(engine, chat("a", sampling=sampling))["a"])
    others = [chat("b", sampling=SamplingParams(temperature=1.2, seed=4)), chat("c")]
    batched = run(engine, others[0], chat("a", sampling=sampling), others[1])
    assert ids(batched["a"]) == alone
    assert ids(batched["b"]) != alone


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=1.0, seed=11)])
def test_a_takeover_continues_after_k_tokens(engine: MLXEngine, sampling: SamplingParams) -> None:
    """After replaying the first k tokens, the rest and the text equal those of an uninterrupted run."""
    job = chat("a", "Write a poem about the sea in emoji 🌊.", sampling=sampling)
    whole = run(engine, job)["a"]
    for k in (1, 6, 11):
        inserted = engine.insert(job, engine.encode(job), ids(whole)[:k])
        rest: list[StepToken] = []
        while engine.num_sequences:
            rest += engine.step()
        assert ids(whole)[:k] + ids(rest) == ids(whole)
        assert "".join(inserted.replayed_texts) + text(rest) == text(whole)


def test_logit_bias(engine: MLXEngine) -> None:
    """-100 bans the token that would be chosen, +100 forces another one."""
    first = ids(run(engine, chat("a", max_tokens=1))["a"])[0]
    banned = SamplingParams(temperature=0, logit_bias={first: -100.0})
    forced = SamplingParams(temperature=0, logit_bias={42: 100.0})
    tokens = run(engine, chat("a", max_tokens=2, sampling=banned), chat("b", max_tokens=2, sampling=forced))
    assert ids(tokens["a"])[0] != first
    assert ids(tokens["b"]) == [42, 42]


def test_repetition_penalty(engine: MLXEngine) -> None:
    """A text repeats itself less, and the other sequence does not change."""
    prompt = TextPrompt("one two one two one two one two")
    plain = GenerationJob(job_id="a", model="m", channel="c", prompt=prompt, max_tokens=8, sampling=GREEDY)
    penalized = SamplingParams(temperature=0, repetition_penalty=1.8, repetition_context_size=64)
    other = GenerationJob(job_id="b", model="m", channel="c", prompt=prompt, max_tokens=8, sampling=penalized)
    tokens = run(engine, plain, other)
    assert text(tokens["a"]).count("two") > text(tokens["b"]).count("two")
    assert ids(run(engine, plain)["a"]) == ids(tokens["a"])


def test_logprobs(engine: MLXEngine) -> None:
    """The greedy token is the most likely one; the top tokens are in order, their probabilities add up to at most 1, their bytes are the text."""
    tokens = run(engine, chat("a", top_logprobs=4), chat("b", top_logprobs=0), chat("c"))
    for token in tokens["a"]:
        assert token.logprob is not None
        assert token.top[0].token_id == token.token_id
        assert token.logprob.logprob == token.top[0].logprob
        values = [each.logprob for each in token.top]
        assert len(values) == 4
        assert values == sorted(values, reverse=True)
        assert sum(2.718281828**value for value in values) <= 1.0001
    own = [token.logprob for token in tokens["a"][:-1]]
    assert b"".join(each.data for each in own if each).decode() == text(tokens["a"])
    assert all(token.logprob and not token.top for token in tokens["b"])
    assert all(token.logprob is None for token in tokens["c"])


def test_logprobs_only_if_requested(engine: MLXEngine) -> None:
    """Sequences with and without log-probabilities, joining and leaving one after another: each gets its own, the same as alone."""
    alone = {top: run(engine, chat("a", max_tokens=9, top_logprobs=top))["a"] for top in (0, 3)}
    tokens: dict[str, list[StepToken]] = {}
    waiting = [chat(str(i), max_tokens=9, top_logprobs=(None, 0, 3)[i % 3]) for i in range(7)]
    while waiting or engine.num_sequences:
        if waiting:
            job = waiting.pop(0)
            engine.insert(job, engine.encode(job), [])
        for token in engine.step():
            tokens.setdefault(token.job_id, []).append(token)
    for i in range(7):
        asked = (None, 0, 3)[i % 3]
        for k, token in enumerate(tokens[str(i)]):
            assert token.token_id == alone[0][k].token_id
            if asked is None:
                assert token.logprob is None
                continue
            expected = alone[asked][k]
            assert token.logprob is not None
            assert expected.logprob is not None
            assert math.isclose(token.logprob.logprob, expected.logprob.logprob, abs_tol=1e-3)
            assert [each.token_id for each in token.top] == [each.token_id for each in expected.top]


def test_logits_that_overflow(engine: MLXEngine) -> None:
    """Such a sequence has log-probabilities that JSON can represent, and the other sequence's tokens do not change."""
    broken = SamplingParams(temperature=0, repetition_penalty=1e-300)
    prompt = ChatPrompt([{"role": "user", "content": "x"}])
    odd = GenerationJob(
        job_id="odd", model="m", channel="c", prompt=prompt, max_tokens=3, sampling=broken, top_logprobs=2
    )
    tokens = run(engine, odd, chat("a", top_logprobs=1))
    for token in tokens["odd"]:
        assert token.logprob is not None
        assert all(math.isfinite(each.logprob) for each in (token.logprob, *token.top))
    assert ids(tokens["a"]) == ids(run(engine, chat("a"))["a"])


def test_removing_a_sequence(engine: MLXEngine) -> None:
    """Removing a sequence that decodes or prefills does not change the tokens of the others."""
    alone = ids(run(engine, chat("a"))["a"])
    for job in (chat("a"), chat("b", max_tokens=500), chat("long", "word " * 300)):
        engine.insert(job, engine.encode(job), [])
    got: list[int] = []
    for _ in range(3):
        got += [token.token_id for token in engine.step() if token.job_id == "a"]
    engine.remove("b")
    engine.remove("long")
    engine.remove("nobody")
    while engine.num_sequences:
        got += [token.token_id for token in engine.step() if token.job_id == "a"]
    assert got == alone


def test_a_prompt_that_is_too_long(engine: MLXEngine) -> None:
    """It is refused, the engine stays empty, and the next request is served."""
    job = GenerationJob(
        job_id="a", model="m", channel="c", prompt=TokenPrompt([5] * engine.info.context_length)
    )
    with pytest.raises(RequestError) as refused:
        engine.encode(job)
    assert refused.value.code == "context_length_exceeded"
    assert engine.num_sequences == 0


def test_a_step_that_fails_does_not_poison_the_engine(
    engine: MLXEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a step that raised, its sequences are gone and the next request is answered correctly."""

    def broken() -> list[Any]:
        raise RuntimeError("out of memory")

    job = chat("a")
    engine.insert(job, engine.encode(job), [])
    engine.step()
    with monkeypatch.context() as patched:
        patched.setattr(engine._batch, "step", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.step()
    assert engine.num_sequences == 0
    assert text(run(engine, chat("a"))["a"]) == "The capital of France is Paris."


class BrokenPart:
    """A logits processor or a matcher that raises in the middle of its sequence."""

    def __init__(self, part: str) -> None:
        self.part = part
        self.num_calls = 0
        self.is_open = False

    def _called(self, part: str) -> None:
        self.num_calls += part == self.part
        if self.num_calls > 2:
            raise ValueError("bad sequence")

    def __call__(self, _token_ids: Any, logits: Any) -> Any:
        self._called("processor")
        return logits

    def advance(self, _token_id: int) -> None:
        self._called("advance")

    def fill(self, words: Any) -> None:
        self._called("fill")
        words[:] = 0xFFFFFFFF


@pytest.mark.parametrize("part", ["processor", "advance", "fill"])
def test_a_bad_sequence_fails_alone(engine: MLXEngine, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """A logits processor or a grammar that raises in the middle ends its own sequence; the other sequence's text is complete."""
    good, bad, broken = chat("good"), chat("bad", max_tokens=50), BrokenPart(part)
    engine.insert(good, engine.encode(good), [])
    with monkeypatch.context() as patched:
        if part == "processor":
            patched.setattr(
                generation, "logits_processors", lambda _sampling, sampler: [guarded(sampler, broken)]
            )
        else:
            patched.setattr(engine._builder, "_matcher", lambda *_: broken)
        engine.insert(bad, engine.encode(bad), [])
    tokens = [token for _ in range(20) for token in engine.step()]
    failures = [token for token in tokens if isinstance(token, SequenceFailure)]
    assert [(f.job_id, str(f.error)) for f in failures] == [("bad", "bad sequence")]
    assert text([t for t in tokens if t.job_id == "good"]) == "The capital of France is Paris."
    assert engine.num_sequences == 0


def test_every_kind_of_sampling_in_one_batch(engine: MLXEngine) -> None:
    """Sequences with each kind of sampling get the tokens that they get alone, also after a takeover."""
    kinds = [
        GREEDY,
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=0.8, seed=2, top_p=0.7, top_k=40, min_p=0.02),
        SamplingParams(temperature=1.0, seed=3, xtc_probability=0.5, xtc_threshold=0.05),
        SamplingParams(temperature=0.9, seed=4, presence_penalty=1.5, frequency_penalty=0.8),
        SamplingParams(temperature=0, frequency_penalty=2.0, repetition_penalty=1.1),
        SamplingParams(temperature=0.5, seed=5, logit_bias={198: -100.0, 30: 3.0}),
    ]
    jobs = [
        chat(str(i), "Count: one two one two one two", max_tokens=10, sampling=kind, top_logprobs=i % 2)
        for i, kind in enumerate(kinds)
    ]
    together = run(engine, *jobs)
    for job in jobs:
        assert ids(run(engine, job)[job.job_id]) == ids(together[job.job_id])
    replay = {job.job_id: ids(together[job.job_id])[:4] for job in jobs if len(together[job.job_id]) > 4}
    going_on = [job for job in jobs if job.job_id in replay]
    rest = run(engine, *going_on, replay=replay)
    for job in going_on:
        assert replay[job.job_id] + ids(rest[job.job_id]) == ids(together[job.job_id])


def test_engines_on_one_machine_share_its_memory(
    demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second engine halves the first one's room for caches; the first gets it back when the second is gone."""
    monkeypatch.setattr(memory_claims, "READ_SECONDS", 0.0)
    settings = Settings(model=str(demo_folder), state_dir=str(tmp_path))
    first = MLXEngine(settings)
    alone = first._memory.room_bytes
    second = MLXEngine(settings)
    assert not first.is_over_memory
    assert first._memory.room_bytes == second._memory.room_bytes
    assert 0.3 * alone < first._memory.room_bytes < 0.5 * alone
    job = chat("a", max_tokens=10)
    assert first.has_room(job, 10, 0)
    del second
    gc.collect()
    assert first.has_room(job, 10, 0)
    assert first._memory.room_bytes == alone


def test_expected_tokens_after_a_takeover(engine: MLXEngine) -> None:
    """Tokens that other workers generated are of the answer, not of the prompt: buffers have room for what memory is reserved for, not more."""
    job = chat("a", max_tokens=1000)
    prompt = engine.encode(job)
    engine.insert(job, prompt, [28] * 300)
    try:
        running = engine._running["a"]
        assert running.sequence.expected_tokens == running.expected_tokens == len(prompt) + 512
    finally:
        engine.remove("a")


def test_memory(demo_folder: Path) -> None:
    """Sequences are admitted while their caches fit together; the context is what one sequence may fill; too little memory is an error."""
    engine = MLXEngine(Settings(model=str(demo_folder), max_batch=8, memory_limit_gb=1.0))
    # 30 layers × 3 heads × 64 × (key and value) × 4 bytes a token (the model's config.json).
    room_tokens = engine._memory.room_bytes / (30 * 3 * 64 * 2 * 4)
    assert engine.info.context_length == pytest.approx(
        room_tokens, abs=256 + 128
    )  # whole steps, and some to spare
    large = chat("a", max_tokens=int(room_tokens * 0.6))
    prompt = engine.encode(large)
    assert engine.has_room(large, len(prompt), 0)
    engine.insert(large, prompt, [])
    assert engine.has_room(chat("b", max_tokens=10), len(prompt), 0)
    for each in engine._running.values():
        each.num_answer_tokens = int(room_tokens * 0.6)
    assert not engine.has_room(chat("b", max_tokens=10), len(prompt), 0)
    assert not engine.is_over_memory
    for each in engine._running.values():
        each.num_answer_tokens = int(room_tokens) + 256
    assert engine.is_over_memory
    with pytest.raises(RequestError, match="maximum context length"):
        engine.encode(
            GenerationJob(job_id="c", model="m", channel="c", prompt=TokenPrompt([5] * int(room_tokens + 1)))
        )
    with pytest.raises(StartupError, match="no room for requests"):
        MLXEngine(Settings(model=str(demo_folder), memory_limit_gb=0.6))


@pytest.mark.heavy
def test_a_model_that_cannot_batch(
    demo_folder: Path, engine: MLXEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is served one at a time, says so in its card, and gives the same tokens, logprobs and seeds; no prefix is cached."""
    monkeypatch.setattr(kv, "new", lambda model: [ChunkedKVCache(10_000) for _ in model.layers])
    single = MLXEngine(Settings(model=str(demo_folder), max_batch=8, prefill_step_tokens=16))
    assert single.info.max_batch == 1
    for job in (
        chat("a"),
        chat("a", sampling=SamplingParams(temperature=1.0, seed=5)),
        chat("a", max_tokens=3),
        chat("a", sampling=SamplingParams(temperature=0, repetition_penalty=1.3)),
        chat("a", "one two " * 20, top_logprobs=0),
    ):
        assert ids(run(single, job)["a"]) == ids(run(engine, job)["a"])
    assert single._prefixes.num_bytes == 0
    single.insert(chat("b", max_tokens=99), single.encode(chat("b")), [])
    while not single.step():
        pass
    single.remove("b")
    assert not single._batch.decoding.caches
    assert text(run(single, chat("a"))["a"]) == "The capital of France is Paris."


@pytest.mark.usefixtures("engine")
@pytest.mark.heavy
def test_memory_stays_within_its_limit(demo_folder: Path) -> None:
    """More sequences than there is room for, admitted as the loop does it: MLX's peak memory for them is below the limit."""
    import mlx.core as mx  # not before an engine has loaded a BLAS

    limit_gb = 0.82
    others_bytes = mx.get_active_memory()
    engine = MLXEngine(Settings(model=str(demo_folder), max_batch=16, memory_limit_gb=limit_gb))
    waiting = [
        GenerationJob(
            job_id=f"{i}",
            model="m",
            channel="c",
            prompt=TokenPrompt([100 + i] * (40 + 5 * i)),
            max_tokens=12,
            sampling=GREEDY,
        )
        for i in range(12)
    ]
    mx.reset_peak_memory()
    max_running = num_ended = 0
    while waiting or engine.num_sequences:
        while waiting and (
            not engine.num_sequences or engine.has_room(waiting[-1], len(engine.encode(waiting[-1])), 0)
        ):
            job = waiting.pop()
            engine.insert(job, engine.encode(job), [])
        max_running = max(max_running, engine.num_sequences)
        num_ended += sum(getattr(token, "finish_reason", None) is not None for token in engine.step())
        assert not engine.is_over_memory
    assert num_ended == 12
    assert 1 < max_running < 12
    assert mx.get_peak_memory() - others_bytes < limit_gb * 2**30
