"""A model whose vocabulary is larger than its tokenizer's, as Qwen's: the ids beyond have no text, and cost nothing else."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from bench.harness.random_model import PRESETS, main, write_model
from common.protocol import ChatPrompt, GenerationJob, SamplingParams, TokenPrompt
from common.settings import Settings
from worker.loop.engine import PromptEcho, StepEvent, StepToken
from worker.mlx.engine import MLXEngine

VOCAB_SIZE, PADDING = 50_000, 500
TINY = {"hidden": 32, "layers": 2, "heads": 2, "kv_heads": 1, "ffn": 64, "vocab": VOCAB_SIZE}
ADDED = 49_300
"""An id that has got a word beyond the demo model's vocabulary."""

UNKNOWN = VOCAB_SIZE - 1

GRAMMAR = 'start: "[" BOOLEAN ("," BOOLEAN){0,3} "]"\nBOOLEAN: "true" | "false"\n'


@pytest.fixture(scope="module")
def engine(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> MLXEngine:
    folder = tmp_path_factory.mktemp("padded")
    write_model(folder, TINY, demo_folder, PADDING)
    return MLXEngine(Settings(model=str(folder), max_batch=4))


def _run(engine: MLXEngine, bias: dict[int, float], **job: Any) -> list[StepEvent]:
    new = GenerationJob(
        job_id="a",
        model="m",
        channel="c",
        prompt=job.pop("prompt", None) or ChatPrompt([{"role": "user", "content": "Hello."}]),
        max_tokens=job.pop("max_tokens", 6),
        sampling=SamplingParams(temperature=0, logit_bias=bias),
        **job,
    )
    engine.insert(new, engine.encode(new), [])
    events: list[StepEvent] = []
    while engine.num_sequences:
        events += engine.step()
    return events


def _tokens(events: list[StepEvent]) -> list[StepToken]:
    return [event for event in events if isinstance(event, StepToken)]


def test_tokens_without_text(engine: MLXEngine) -> None:
    """They count as tokens, and the answer ends at its limit; their log-probabilities have no bytes."""
    tokens = _tokens(_run(engine, {UNKNOWN: 100.0}, top_logprobs=20))
    assert [(token.token_id, token.text) for token in tokens] == 6 * [(UNKNOWN, "")]
    assert tokens[-1].finish_reason == "length"
    for token in tokens:
        assert token.logprob is not None
        assert (token.logprob.token_id, token.logprob.data) == (UNKNOWN, b"")
        assert len(token.top) == 20
        assert all(math.isfinite(each.logprob) for each in token.top)


def test_words_beyond_the_tokenizers_own(engine: MLXEngine) -> None:
    """A larger vocabulary has text up to its padding."""
    tokens = _tokens(_run(engine, {ADDED: 100.0}))
    texts = {token.text for token in tokens}
    assert len(texts) == 1
    assert texts.pop().strip().isalpha()


def test_a_grammar_never_allows_them(engine: MLXEngine) -> None:
    """They are masked whatever the bias."""
    tokens = _tokens(_run(engine, {UNKNOWN: 100.0, ADDED: 100.0}, grammar=GRAMMAR, max_tokens=60))
    assert all(token.token_id < ADDED for token in tokens)
    assert set(json.loads("".join(token.text for token in tokens))) <= {True, False}


def test_they_are_echoed(engine: MLXEngine) -> None:
    """A prompt of token ids may contain them, with log-probabilities."""
    events = _run(engine, {}, prompt=TokenPrompt([5, UNKNOWN, 6]), echo=True, top_logprobs=2, max_tokens=1)
    (echo,) = [event for event in events if isinstance(event, PromptEcho)]
    assert [each.token_id for each in echo.tokens] == [5, UNKNOWN, 6]
    assert echo.tokens[1].data == b""


def test_random_answers_end_at_their_limit(engine: MLXEngine) -> None:
    """The figures of a random model are those of full batches: the end of text is never the likeliest token."""
    tokens = _tokens(_run(engine, {}, max_tokens=64))
    assert len(tokens) == 64
    assert tokens[-1].finish_reason == "length"


def test_the_command(demo_folder: Path, tmp_path: Path) -> None:
    """It writes a preset in which single sizes are replaced, and refuses a vocabulary that is too small for the tokenizer."""
    sizes = [
        "--hidden=32",
        "--layers=1",
        "--heads=2",
        "--kv-heads=1",
        "--ffn=64",
        f"--tokenizer={demo_folder}",
    ]
    assert main([str(tmp_path), "--preset", "1b", *sizes]) == 0
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["vocab_size"], config["num_hidden_layers"]) == (PRESETS["1b"]["vocab"], 1)
    with pytest.raises(ValueError, match="49152 tokens, more than the vocabulary of 1000"):
        main([str(tmp_path), *sizes, "--vocab=1000"])
