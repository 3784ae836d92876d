"""Cost of sampling: a decode step of a full batch with each kind of sampling, relative to a greedy batch on the same engine.

`python -m bench.sampling` interleaves rounds of 32 sequences in one process: all greedy; all drawn with a seed; all with top_p;
a mixture of every kind; all with penalties; all with 20 log-probabilities; log-probabilities combined with grammars, biases and penalties;
the mix of `bench.contest --mix`. Only decode steps are timed, not prefill.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from bench.harness.meter import wait_until_quiet
from bench.harness.prompts import prompts
from bench.harness.table import Table, say
from common.protocol import ChatPrompt, GenerationJob, SamplingParams
from common.schema import grammar
from common.settings import Settings
from worker.loop.engine import StepToken
from worker.mlx.engine import MLXEngine
from worker.models import model_folder

NUM_SEQUENCES = 32
PATIENCE_SECONDS = 60.0

_NUMBERS = grammar.for_json_schema(
    {
        "type": "object",
        "properties": {"numbers": {"type": "array", "items": {"type": "integer"}, "minItems": 400}},
        "required": ["numbers"],
        "additionalProperties": False,
    }
)
"""A form so long that no answer completes it."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a sequence asks for."""

    sampling: SamplingParams = SamplingParams(temperature=0.0)  # noqa: RUF009 (frozen)
    top_logprobs: int | None = None
    grammar: str | None = None


_BIAS = dict.fromkeys(range(100, 140), 1.5)
_MIXTURE = (
    Asked(),
    Asked(SamplingParams(temperature=1.0)),
    Asked(SamplingParams(temperature=0.8, top_p=0.9)),
    Asked(SamplingParams(temperature=0.8, top_k=40)),
    Asked(SamplingParams(temperature=1.0, min_p=0.05)),
    Asked(SamplingParams(temperature=0.7, frequency_penalty=0.5, presence_penalty=0.5)),
    Asked(SamplingParams(temperature=0.0, logit_bias={5: -100.0})),
    Asked(SamplingParams(temperature=1.0, xtc_probability=0.5, xtc_threshold=0.1)),
)
_COMBINED = (
    Asked(top_logprobs=20, grammar=_NUMBERS),
    Asked(
        SamplingParams(temperature=0.8, frequency_penalty=0.3, presence_penalty=0.3, logit_bias=_BIAS),
        top_logprobs=20,
    ),
    Asked(
        SamplingParams(temperature=0.7, frequency_penalty=0.3, logit_bias=_BIAS),
        top_logprobs=20,
        grammar=_NUMBERS,
    ),
    Asked(SamplingParams(temperature=0.9, top_p=0.9, repetition_penalty=1.1), top_logprobs=5),
)
_CONTEST = (
    Asked(),
    Asked(SamplingParams(temperature=0.8, seed=7)),
    Asked(SamplingParams(temperature=0.7, frequency_penalty=0.3, presence_penalty=0.3)),
    Asked(SamplingParams(temperature=1.0, top_p=0.9), top_logprobs=2),
    Asked(grammar=_NUMBERS),
)
KINDS: dict[str, Sequence[Asked]] = {
    "greedy": [Asked()],
    "drawn": [Asked(SamplingParams(temperature=1.0))],
    "top_p": [Asked(SamplingParams(temperature=1.0, top_p=0.9))],
    "every kind": _MIXTURE,
    "penalties": [Asked(SamplingParams(temperature=1.0, frequency_penalty=0.5))],
    "log-probabilities": [Asked(top_logprobs=20)],
    "combined": _COMBINED,
    "contest's mix": _CONTEST,
}
"""What the sequences of a batch ask for, in turn."""


def step_seconds(engine: MLXEngine, kind: str, num_steps: int, num_sequences: int) -> float:
    """Median time of a decode step of a full batch."""
    for i, prompt in enumerate(prompts(num_sequences)):
        asked = KINDS[kind][i % len(KINDS[kind])]
        job = GenerationJob(
            job_id=f"{i}",
            model="m",
            channel="c",
            prompt=ChatPrompt([{"role": "user", "content": prompt}]),
            max_tokens=num_steps + 500,
            # Larger than the number of steps, so that the batch stays full.
            sampling=msgspec.structs.replace(asked.sampling, seed=i),
            top_logprobs=asked.top_logprobs,
            grammar=asked.grammar,
        )
        engine.insert(job, engine.encode(job), [])
    step_times: list[float] = []
    while len(step_times) < num_steps:
        began = time.perf_counter()
        tokens = [token for token in engine.step() if isinstance(token, StepToken)]
        if len(tokens) == num_sequences:
            step_times.append(time.perf_counter() - began)
        elif engine.num_sequences < num_sequences:
            break  # a sequence ended at an end-of-text token
    for i in range(num_sequences):
        engine.remove(f"{i}")
    return statistics.median(step_times)


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rows", type=int, default=NUM_SEQUENCES)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), metavar="KIND")
    arguments = parser.parse_args()
    settings = Settings(model=arguments.model, max_batch=arguments.rows, prompt_cache_gb=0)
    engine = MLXEngine(settings, model_folder.find(settings))
    seconds: dict[str, list[float]] = {kind: [] for kind in dict.fromkeys(["greedy", *arguments.kinds])}
    wait_until_quiet(PATIENCE_SECONDS)
    for _ in range(arguments.rounds):
        for kind, medians in seconds.items():
            medians.append(step_seconds(engine, kind, arguments.steps, arguments.rows))
    greedy = statistics.median(seconds["greedy"])
    table = Table(["sampling", "ms a step", "÷ greedy"])
    for kind, medians in seconds.items():
        median = statistics.median(medians)
        table.add([kind, f"{median * 1e3:.1f}", f"{median / greedy:.3f}"])
    say(
        f"{arguments.rows} sequences; medians of {arguments.rounds} interleaved rounds of {arguments.steps} steps"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
