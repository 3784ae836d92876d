"""Tokens per second while sequences continuously join and leave the batch, as on a server with many users, in one process.

`python -m bench.churn` keeps a number of sequences decoding: whenever an answer is finished, another prompt takes its place.
Prompts have 30 to 59 tokens that are not cached, answers as many tokens as `--shortest` and `--longest` say. Interleaved rounds of
mlx-lm's `BatchGenerator` and of the worker's engine, on the same prompts, greedily, with the same limits.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from bench.harness.meter import wait_until_quiet
from bench.harness.table import Table, percentile, say, with_range
from common.protocol import GenerationJob, SamplingParams, TokenPrompt
from common.settings import Settings
from worker.mlx.engine import MLXEngine
from worker.models import model_folder

PATIENCE_SECONDS = 60.0
PROMPT_TOKENS = (30, 60)
NUM_ROWS = (1, 8, 32)
SEED = 1


def requests(engine: MLXEngine, shortest: int, longest: int, number: int) -> Iterator[tuple[list[int], int]]:
    """Endless prompts and answer lengths; the same number always gives the same ones."""
    rng = random.Random(SEED + number)  # noqa: S311 (the same each time)
    while True:
        prompt = [rng.randrange(engine.info.vocab_size) for _ in range(rng.randrange(*PROMPT_TOKENS))]
        yield prompt, rng.randint(shortest, longest)


def raw(
    engine: MLXEngine, num_rows: int
) -> tuple[Callable[[list[int], int], None], Callable[[], list[bool]]]:
    """Functions that add a sequence to mlx-lm's own batch, and that run a step: whether each token was its sequence's last."""
    import mlx.core as mx
    from mlx_lm.generate import BatchGenerator

    generator: Any = BatchGenerator(
        engine._model,  # noqa: SLF001 (loaded once for both)
        stop_tokens=[[token_id] for token_id in engine._tokenizer.eos_token_ids],  # noqa: SLF001
        completion_batch_size=num_rows,
        stream=mx.default_stream(mx.default_device()),
    )
    generator.close()
    return (
        lambda prompt, num_tokens: generator.insert([prompt], max_tokens=[num_tokens]),
        lambda: [each.finish_reason is not None for each in generator.next()[1]],
    )


def ours(
    engine: MLXEngine, _num_rows: int
) -> tuple[Callable[[list[int], int], None], Callable[[], list[bool]]]:
    """As `raw`, for the worker's engine."""
    names = (f"{number:032d}" for number in range(10**9))

    def add(prompt: list[int], num_tokens: int) -> None:
        job = GenerationJob(
            job_id=next(names),
            model="m",
            channel="c",
            prompt=TokenPrompt(prompt),
            max_tokens=num_tokens,
            sampling=SamplingParams(temperature=0.0),
        )
        engine.insert(job, prompt, [])

    return add, lambda: [event.finish_reason is not None for event in engine.step()]  # type: ignore[union-attr]


def measure(
    engine: MLXEngine, start: Any, num_rows: int, number: int, arguments: argparse.Namespace
) -> tuple[float, float, float]:
    """Tokens per second, and the median and 99th percentile of a step in milliseconds."""
    add, step = start(engine, num_rows)
    asked = requests(engine, arguments.shortest, arguments.longest, number)
    for _ in range(num_rows):
        add(*next(asked))
    num_tokens = 0
    steps: list[float] = []
    # The first answers of a round begin together, unlike those of a busy server.
    warm_at = time.perf_counter() + arguments.warm_up
    ends_at = warm_at + arguments.seconds
    began = None
    while (now := time.perf_counter()) < ends_at:
        if began is None and now >= warm_at:
            began, num_tokens, steps = now, 0, []
        tokens = step()
        num_tokens += len(tokens)
        for _ in range(sum(tokens)):
            add(*next(asked))
        steps.append(1000 * (time.perf_counter() - now))
    seconds = time.perf_counter() - (began or warm_at)
    for job_id in list(engine._running):  # noqa: SLF001 (no public method lists them)
        engine.remove(job_id)
    return num_tokens / seconds, statistics.median(steps), percentile(steps, 99)


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.churn", description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rows", type=int, nargs="+", default=list(NUM_ROWS), metavar="N")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--warm-up", type=float, default=3.0, metavar="SECONDS")
    parser.add_argument("--shortest", type=int, default=20, metavar="TOKENS")
    parser.add_argument("--longest", type=int, default=100, metavar="TOKENS")
    arguments = parser.parse_args()
    settings = Settings(model=arguments.model, max_batch=max(arguments.rows), prompt_cache_gb=0)
    engine = MLXEngine(settings, model_folder.find(settings))
    table = Table(
        [
            "rows",
            "mlx-lm, tokens/s",
            "the worker's engine",
            "÷ mlx-lm",
            "a step, ms: mlx-lm, p50, p99",
            "the engine",
        ]
    )
    for num_rows in arguments.rows:
        wait_until_quiet(PATIENCE_SECONDS)
        rounds = []
        for number in range(arguments.rounds):
            order = (raw, ours) if number % 2 == 0 else (ours, raw)
            measured = {way: measure(engine, way, num_rows, number, arguments) for way in order}
            rounds.append([measured[raw], measured[ours]])
        ratios = [own[0] / other[0] for other, own in rounds]
        middle = [[statistics.median(each[way][k] for each in rounds) for k in range(3)] for way in (0, 1)]
        table.add(
            [
                str(num_rows),
                *(with_range([each[way][0] for each in rounds], ",.1f") for way in (0, 1)),
                with_range(ratios, ".2f"),
                *(f"{way[1]:.1f}, {way[2]:.1f}" for way in middle),
            ]
        )
    say(
        f"medians and ranges of {arguments.rounds} rounds, answers of {arguments.shortest} to {arguments.longest} tokens"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
