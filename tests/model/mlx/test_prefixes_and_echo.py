"""Prompts on the real demo model: echoed with their log-probabilities, and prefilled from a cached prefix."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest

from common.protocol import ChatPrompt, GenerationJob, SamplingParams, TextPrompt, TokenPrompt
from common.settings import Settings
from worker.loop.engine import InsertResult, PromptEcho, StepToken
from worker.mlx.engine import MLXEngine

GREEDY = SamplingParams(temperature=0)
SYSTEM = "You answer in one word. " + "Never mind the weather, the news or the time of day. " * 12


@pytest.fixture(scope="module")
def engine(demo_folder: Path) -> MLXEngine:
    return MLXEngine(Settings(model=str(demo_folder), max_batch=8))


def job(job_id: str, prompt: Any, max_tokens: int, **fields: Any) -> GenerationJob:
    return GenerationJob(
        job_id=job_id,
        model="m",
        channel="c",
        prompt=prompt,
        max_tokens=max_tokens,
        sampling=fields.pop("sampling", GREEDY),
        **fields,
    )


def chat(job_id: str, *texts: str, max_tokens: int = 8, **fields: Any) -> GenerationJob:
    roles = ("user", "assistant")
    messages = [{"role": "system", "content": SYSTEM}]
    messages += [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return job(job_id, ChatPrompt(messages), max_tokens, **fields)


def insert(engine: MLXEngine, *jobs: GenerationJob) -> list[InsertResult]:
    return [engine.insert(each, engine.encode(each), []) for each in jobs]


def run(engine: MLXEngine) -> tuple[dict[str, list[StepToken]], dict[str, PromptEcho]]:
    """Step until no sequence is left; returns tokens and echoes by job."""
    tokens: dict[str, list[StepToken]] = {}
    echoes: dict[str, PromptEcho] = {}
    while engine.num_sequences:
        for event in engine.step():
            if isinstance(event, PromptEcho):
                assert event.job_id not in tokens
                echoes[event.job_id] = event
            else:
                assert isinstance(event, StepToken)
                tokens.setdefault(event.job_id, []).append(event)
    return tokens, echoes


def ids(tokens: list[StepToken]) -> list[int]:
    return [token.token_id for token in tokens]


def test_echoed_logprobs_equal_generated_ones(engine: MLXEngine) -> None:
    """The log-probabilities of an echoed text are those that its tokens had when they were generated."""
    first = job("a", TextPrompt("The capital of France is"), 8, top_logprobs=2)
    insert(engine, first)
    generated = run(engine)[0]["a"]
    text = "The capital of France is" + "".join(token.text for token in generated)
    again = job("b", TextPrompt(text), 0, top_logprobs=2, echo=True)
    insert(engine, again)
    tokens, echoes = run(engine)
    assert tokens == {}
    echo = echoes["b"]
    assert echo.text == text
    assert b"".join(token.data for token in echo.tokens).decode() == text
    for token, before in zip(echo.tokens[-8:], generated, strict=True):
        assert before.logprob is not None
        assert token.token_id == before.token_id
        assert token.logprob == pytest.approx(before.logprob.logprob, abs=1e-3)
    assert [top[0].token_id for top in echo.tops[-8:]] == [before.top[0].token_id for before in generated]
    assert echo.tops[0] == []


def test_a_scored_prompt_is_in_memory_once(engine: MLXEngine) -> None:
    """What scoring computed becomes the sequence's own and is freed when the batch has copied it, not when the answer ends."""
    insert(engine, job("a", TextPrompt("The capital of France is"), 4, top_logprobs=0, echo=True))
    scoring = engine._running["a"].scoring
    assert scoring is not None
    layer = weakref.ref(scoring.caches[0])
    del scoring
    while not any(isinstance(event, StepToken) for event in engine.step()):
        pass
    assert "a" in engine._running
    assert layer() is None
    run(engine)


def test_an_echo_does_not_change_the_answer(engine: MLXEngine) -> None:
    """The answer is the same with an echo, in a batch, and if the prompt is scored in pieces; token ids are echoed as their text."""
    long = "one two three four five six seven eight " * 30
    token_ids = engine.encode(job("x", TextPrompt(long), 1))
    insert(engine, job("plain", TextPrompt(long), 6))
    plain = ids(run(engine)[0]["plain"])
    insert(
        engine,
        job("scored", TextPrompt(long), 6, top_logprobs=0, echo=True),
        job("text", TextPrompt(long), 6, echo=True),
        job("ids", TokenPrompt(token_ids), 6, echo=True),
        chat("other", "Hello!"),
    )
    tokens, echoes = run(engine)
    assert ids(tokens["scored"]) == ids(tokens["text"]) == ids(tokens["ids"]) == plain
    assert {echoes[each].text for each in ("scored", "text", "ids")} == {long}
    assert len(echoes["scored"].tokens) == len(token_ids)
    assert echoes["text"].tokens == []


def test_removal_while_a_prompt_is_scored(engine: MLXEngine) -> None:
    """The sequence is removed like any other."""
    insert(engine, job("a", TextPrompt("word " * 900), 5, top_logprobs=0, echo=True))
    engine.step()
    assert engine.num_sequences == 1
    engine.remove("a")
    assert engine.num_sequences == 0


def test_no_tokens_and_no_echo(engine: MLXEngine) -> None:
    """A job that may generate nothing and wants no echo leaves no sequence behind."""
    [inserted] = insert(engine, job("a", TextPrompt("Hello"), 0))
    assert (inserted.max_tokens, engine.num_sequences) == (0, 0)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        SamplingParams(temperature=1.0, seed=3, frequency_penalty=0.5),
    ],
)
def test_a_cached_answer_equals_a_fresh_one(
    demo_folder: Path, engine: MLXEngine, sampling: SamplingParams
) -> None:
    """A conversation's second turn, the same prompt again, and another question after the same system prompt."""
    fresh = MLXEngine(Settings(model=str(demo_folder), max_batch=8, prompt_cache_gb=0))
    turns = [
        chat("1", "What is the capital of France?", sampling=sampling),
        chat("2", "What is the capital of France?", "Paris", "And of Italy?", sampling=sampling),
        chat("3", "What is the capital of France?", sampling=sampling),
        chat("4", "Name a color.", sampling=sampling),
    ]
    cached = []
    for turn in turns:
        [uncached], [inserted] = insert(fresh, turn), insert(engine, turn)
        assert ids(run(fresh)[0][turn.job_id]) == ids(run(engine)[0][turn.job_id])
        assert uncached.cached_tokens == 0
        cached.append(inserted.cached_tokens)
        assert inserted.cached_tokens < inserted.prompt_tokens
    system_tokens = len(fresh.encode(chat("x", "")))
    assert all(num > 0.8 * system_tokens for num in cached[1:])


@pytest.mark.heavy
def test_a_burst_prefills_a_common_prefix_once(demo_folder: Path) -> None:
    """The first sequence prefills it, the others wait and prefill the rest; each answer is the same as alone."""
    engine = MLXEngine(Settings(model=str(demo_folder), max_batch=8))
    jobs = [chat(str(i), f"Say {word}.") for i, word in enumerate(("yes", "no", "maybe", "never"))]
    alone = {}
    fresh = MLXEngine(Settings(model=str(demo_folder), max_batch=8, prompt_cache_gb=0))
    for each in jobs:
        insert(fresh, each)
        alone |= {name: ids(tokens) for name, tokens in run(fresh)[0].items()}
    together = insert(engine, *jobs)
    assert {name: ids(tokens) for name, tokens in run(engine)[0].items()} == alone
    assert together[0].cached_tokens == 0
    assert all(each.cached_tokens > 100 for each in together[1:])


def test_nothing_waits_for_a_prefix_that_will_not_be_cached(demo_folder: Path) -> None:
    """Without a prefix cache, sequences with a common prefix prefill at once."""
    engine = MLXEngine(Settings(model=str(demo_folder), max_batch=8, prompt_cache_gb=0))
    insert(engine, *(job(name, TokenPrompt([7] * 200), 2) for name in "ab"))
    assert len(engine._batch.prefilling) == 2
    tokens, _ = run(engine)
    assert ids(tokens["a"]) == ids(tokens["b"])


def test_removal_of_a_sequence_that_others_wait_for(engine: MLXEngine) -> None:
    """Those that wait for its prefix prefill it themselves."""
    unlike = "Nothing like the others. " * 40
    jobs = [job(name, TextPrompt(unlike + name), 3) for name in ("a", "b", "c")]
    insert(engine, *jobs)
    engine.remove("a")
    tokens, _ = run(engine)
    assert {name: len(each) for name, each in tokens.items()} == {"b": 3, "c": 3}


@pytest.mark.heavy
def test_memory_for_cached_prefixes_is_bounded(demo_folder: Path) -> None:
    """The least recently used one is evicted first, and sequences that need the memory get it."""
    engine = MLXEngine(Settings(model=str(demo_folder), max_batch=4, prompt_cache_gb=0.02))
    max_bytes = 0
    for i in range(6):
        insert(engine, job(str(i), TokenPrompt([50 + i] * 150), 2))
        run(engine)
        max_bytes = max(max_bytes, engine._prefixes.num_bytes)
    assert 0 < max_bytes <= 0.02 * 2**30
    [newest] = insert(engine, job("n", TokenPrompt([55] * 150), 2))
    [oldest] = insert(engine, job("o", TokenPrompt([50] * 150), 2))
    run(engine)
    assert newest.cached_tokens >= 148
    assert oldest.cached_tokens == 0
    engine._prefixes.shrink_to(0)
    assert engine._prefixes.num_bytes == 0
