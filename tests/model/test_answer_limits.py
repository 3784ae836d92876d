"""When answers end, with the demo model: `min_tokens`, `ignore_eos`, and a limit of the reasoning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest

from common.protocol import ChatPrompt, GenerationJob, Reasoning, SamplingParams
from common.schema import grammar
from common.settings import Settings
from worker.loop.engine import InsertResult, StepToken
from worker.loop.sequence import Sequence
from worker.mlx.engine import MLXEngine

SCHEMA = {
    "type": "object",
    "properties": {"n": {"enum": [1, 2]}},
    "required": ["n"],
    "additionalProperties": False,
}
REASONING_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>' }}{% endif %}"
)


@pytest.fixture(scope="module")
def engine(demo_folder: Path) -> MLXEngine:
    return MLXEngine(Settings(model=str(demo_folder), max_batch=8))


@pytest.fixture(scope="module")
def thinker(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> MLXEngine:
    """The demo model with two unused tokens as markers of reasoning, and a template that opens it."""
    folder = tmp_path_factory.mktemp("thinker")
    for path in demo_folder.iterdir():
        (folder / path.name).symlink_to(path)
    tokenizer = json.loads((demo_folder / "tokenizer.json").read_text())
    names = {"<repo_name>": "<think>", "<reponame>": "<think>", "<file_sep>": "</think>"}
    for added in tokenizer["added_tokens"]:
        if added["content"] in names:
            new = names[added["content"]]
            tokenizer["model"]["vocab"][new] = tokenizer["model"]["vocab"].pop(added["content"])
            added |= {"content": new, "special": False}
    config = json.loads((demo_folder / "tokenizer_config.json").read_text())
    config["chat_template"] = REASONING_TEMPLATE
    for decoded in config.get("added_tokens_decoder", {}).values():
        decoded["content"] = names.get(decoded["content"], decoded["content"])
    config["additional_special_tokens"] = ["<|im_start|>", "<|im_end|>"]
    for name, value in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
        (folder / name).unlink()
        (folder / name).write_text(json.dumps(value))
    for name in ("special_tokens_map.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    return MLXEngine(Settings(model=str(folder), max_batch=8))


def chat(job_id: str, *, sampling: SamplingParams | None = None, **fields: Any) -> GenerationJob:
    prompt = ChatPrompt([{"role": "user", "content": "What is 2 + 2? Answer with one number."}])
    return GenerationJob(
        job_id=job_id,
        model="m",
        channel="c",
        prompt=prompt,
        sampling=sampling or SamplingParams(temperature=0),
        **({"max_tokens": 40} | fields),
    )


def run(
    engine: MLXEngine, *jobs: GenerationJob, replay: list[int] | None = None
) -> dict[str, tuple[list[StepToken], InsertResult]]:
    """The tokens of each job, and what the engine said of it."""
    results = {
        job.job_id: (list[StepToken](), engine.insert(job, engine.encode(job), replay or [])) for job in jobs
    }
    while engine.num_sequences:
        for event in engine.step():
            assert isinstance(event, StepToken)
            results[event.job_id][0].append(event)
    return results


def tokens_of(engine: MLXEngine, job: GenerationJob, replay: list[int] | None = None) -> list[StepToken]:
    return run(engine, job, replay=replay)[job.job_id][0]


def ids(tokens: list[StepToken]) -> list[int]:
    return [token.token_id for token in tokens]


def test_ignore_eos(engine: MLXEngine) -> None:
    """The answer goes on to `max_tokens`; end-of-text tokens have no text, and up to the first it is the same answer."""
    normal = tokens_of(engine, chat("a"))
    assert (normal[-1].finish_reason, len(normal) < 40) == ("stop", True)
    longer = tokens_of(engine, chat("a", sampling=SamplingParams(temperature=0, ignore_eos=True)))
    assert (len(longer), longer[-1].finish_reason) == (40, "length")
    assert ids(longer)[: len(normal)] == ids(normal)
    assert "<|im_end|>" not in "".join(token.text for token in longer)
    k = len(normal) + 2
    rest = tokens_of(
        engine, chat("a", sampling=SamplingParams(temperature=0, ignore_eos=True)), replay=ids(longer)[:k]
    )
    assert ids(longer)[:k] + ids(rest) == ids(longer)


def test_stop_token_ids(engine: MLXEngine) -> None:
    """Such a token ends the answer, also after a takeover; it counts, and has a text only if the client asks for it."""
    longer = tokens_of(engine, chat("a", sampling=SamplingParams(temperature=0, ignore_eos=True)))
    k = next(i for i in range(2, 40) if longer[i].text.strip() and longer[i].token_id not in ids(longer)[:i])
    sampling = SamplingParams(temperature=0, ignore_eos=True, stop_token_ids=[longer[k].token_id])
    stopped = tokens_of(engine, chat("a", sampling=sampling))
    assert ids(stopped) == ids(longer)[: k + 1]
    assert (stopped[-1].finish_reason, stopped[-1].text) == ("stop", "")
    assert ids(tokens_of(engine, chat("a", sampling=sampling), ids(longer)[:k])) == [longer[k].token_id]
    shown = tokens_of(engine, chat("a", sampling=sampling, includes_stop=True))
    assert shown[-1].text == longer[k].text
    later = msgspec.structs.replace(sampling, min_tokens=k + 2)
    assert longer[k].token_id not in ids(tokens_of(engine, chat("a", sampling=later)))[: k + 2]


@pytest.mark.parametrize("temperature", [0.0, pytest.param(1.0, marks=pytest.mark.heavy)])
def test_min_tokens(engine: MLXEngine, temperature: float) -> None:
    """No end before, next to a sequence that is not changed; the same after a takeover at any point."""
    eos = set(engine._eos_token_ids)
    asking = chat(
        "a", sampling=SamplingParams(temperature=temperature, min_tokens=25, seed=1), top_logprobs=1
    )
    other = chat("b", sampling=SamplingParams(temperature=temperature, seed=1))
    together = run(engine, asking, other)
    tokens = together["a"][0]
    assert len(tokens) > 25
    assert not eos & set(ids(tokens)[:25])
    assert ids(together["b"][0]) == ids(tokens_of(engine, other))
    for k in (1, 24, 25):
        assert ids(tokens)[:k] + ids(tokens_of(engine, asking, ids(tokens)[:k])) == ids(tokens)
    assert all(token.logprob is not None and -100 < token.logprob.logprob <= 0 for token in tokens)


@pytest.mark.parametrize(
    "sampling", [SamplingParams(temperature=0, min_tokens=30), SamplingParams(ignore_eos=True)]
)
def test_a_grammar_that_has_ended(engine: MLXEngine, sampling: SamplingParams) -> None:
    """The answer stays valid: end-of-text tokens without text follow, up to the number of tokens that is asked for."""
    tokens = tokens_of(engine, chat("a", grammar=grammar.for_json_schema(SCHEMA), sampling=sampling))
    jsonschema.validate(json.loads("".join(token.text for token in tokens)), SCHEMA)
    if sampling.ignore_eos:
        assert (len(tokens), tokens[-1].finish_reason) == (40, "length")
    else:
        assert (len(tokens), tokens[-1].finish_reason) == (31, "stop")


def reasoning_of(job: GenerationJob, result: tuple[list[StepToken], InsertResult]) -> tuple[int, str, str]:
    """The reasoning tokens in the usage, the reasoning, and the content."""
    tokens, inserted = result
    sequence = Sequence(job, "a-1", inserted)
    deltas = [sequence.make_delta(token)[0] for token in tokens]
    pieces = [piece.text for delta in deltas for piece in delta.pieces if isinstance(piece, Reasoning)]
    usage = sequence.make_finished("stop").usage
    return usage.reasoning_tokens, "".join(pieces), "".join(delta.text for delta in deltas)


def test_a_thinking_budget(thinker: MLXEngine) -> None:
    """Reasoning that would go on forever ends after so many tokens, and the answer follows; without a limit it does not."""
    assert thinker.info.can_reason
    jobs = [
        chat(
            str(limit),
            max_reasoning_tokens=limit,
            top_logprobs=1 if limit == 8 else None,
            sampling=SamplingParams(temperature=0, min_tokens=20),
        )
        for limit in (0, 1, 8, None)
    ]
    results = run(thinker, *jobs)
    for job in jobs[:3]:
        num_tokens, reasoning, content = reasoning_of(job, results[job.job_id])
        assert num_tokens == job.max_reasoning_tokens + 1  # the marker that closes it
        assert bool(reasoning) == (job.max_reasoning_tokens == 8)  # the first token is white space
        assert content
    num_tokens, _, content = reasoning_of(jobs[3], results["None"])
    assert (num_tokens, content) == (len(results["None"][0]), "")
    assert ids(results["8"][0])[:8] == ids(results["None"][0])[:8]
    forced = results["8"][0][8].logprob
    assert forced is not None
    assert forced.logprob == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("constrained", [False, True])
def test_a_thinking_budget_after_a_takeover(thinker: MLXEngine, constrained: bool) -> None:
    """The rest is the same wherever it was interrupted; a grammar holds for what follows the reasoning."""
    job = chat("a", max_reasoning_tokens=5, grammar=grammar.for_json_schema(SCHEMA) if constrained else None)
    result = run(thinker, job)["a"]
    num_tokens, _, content = reasoning_of(job, result)
    assert num_tokens == 6
    if constrained:
        jsonschema.validate(json.loads(content), SCHEMA)
    whole = ids(result[0])
    for k in (1, 5, 6, 8):
        assert whole[:k] + ids(tokens_of(thinker, job, whole[:k])) == whole


def test_a_budget_of_a_model_that_does_not_reason(engine: MLXEngine) -> None:
    """It changes nothing."""
    assert not engine.info.can_reason
    assert ids(tokens_of(engine, chat("a", max_reasoning_tokens=0))) == ids(tokens_of(engine, chat("a")))
