"""A decode step of the worker's batch against one of mlx-lm's `BatchGenerator`, in one process, on the same model and prompts.

`python -m bench.decoding` interleaves rounds of mlx-lm's batch, of the worker's (`worker.mlx.batch`), and of the worker's complete
generation loop with a journal that writes nothing. "Even" prompts have one length and need no padding, "uneven" ones do. Only
decode steps are timed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

from bench.harness.meter import wait_until_quiet
from bench.harness.table import Table, say, with_range
from common.protocol import GenerationJob, SamplingParams, TokenPrompt
from common.settings import Settings
from worker.loop.generation_loop import GenerationLoop
from worker.loop.journal import AppendResult, JournalEntry
from worker.loop.messages import Abort, AbortReason, Admit, Message
from worker.mlx.engine import MLXEngine
from worker.models import model_folder

PATIENCE_SECONDS = 60.0
PROMPT_TOKENS = 45
MAX_PADDING = 23
NUM_ROWS = (1, 8, 32)


class NoJournal:
    """Accepts all entries and writes nothing."""

    def send(self, entries: Sequence[JournalEntry]) -> None:
        """As `worker.loop.journal.Journal.send`."""

    def collect(self) -> AppendResult:
        """As `worker.loop.journal.Journal.collect`."""
        return AppendResult()


def prompts(num_rows: int, *, is_even: bool) -> list[list[int]]:
    """Token ids for each sequence; their meaning does not matter."""
    longest = list(range(5, 5 + PROMPT_TOKENS))
    return [longest if is_even else longest[i * 5 % MAX_PADDING :] for i in range(num_rows)]


def raw(engine: MLXEngine, rows: list[list[int]], num_steps: int) -> float:
    """Median seconds of a step of mlx-lm's own batch."""
    import mlx.core as mx
    from mlx_lm.generate import BatchGenerator

    generator: Any = BatchGenerator(
        engine._model,  # noqa: SLF001 (loaded once for both)
        completion_batch_size=len(rows),
        stream=mx.default_stream(mx.default_device()),
    )
    generator.close()  # so that no memory stays wired, as in a worker
    generator.insert(rows, max_tokens=[2 * num_steps + 100] * len(rows))
    return _median_step(lambda: len(generator.next()[1]), len(rows), num_steps)


def batch(engine: MLXEngine, rows: list[list[int]], num_steps: int) -> float:
    """As `raw`, for the worker's batch."""
    jobs = _jobs(rows, num_steps)
    for job, prompt in zip(jobs, rows, strict=True):
        engine.insert(job, prompt, [])
    seconds = _median_step(lambda: len(engine._batch.step()), len(rows), num_steps)  # noqa: SLF001 (without its text)
    for job in jobs:
        engine.remove(job.job_id)
    return seconds


def loop(engine: MLXEngine, rows: list[list[int]], num_steps: int) -> float:
    """As `raw`, for the complete loop, text, events and their encoding included."""
    inbox: SimpleQueue[Message] = SimpleQueue()
    generation = GenerationLoop(engine=engine, journal=NoJournal(), inbox=inbox, on_job_end=lambda _: None)
    jobs = _jobs(rows, num_steps)
    for job, prompt in zip(jobs, rows, strict=True):
        inbox.put(Admit(job, f"{job.job_id}-run", prompt))

    def run_once() -> int:
        before = generation.num_tokens
        generation.run_once()
        return generation.num_tokens - before

    seconds = _median_step(run_once, len(rows), num_steps)
    for job in jobs:
        inbox.put(Abort(job.job_id, AbortReason.REQUEUED))
    run_once()
    return seconds


def _jobs(rows: list[list[int]], num_steps: int) -> list[GenerationJob]:
    return [
        GenerationJob(
            job_id=f"{i:032d}",
            model="m",
            channel="c",
            prompt=TokenPrompt(prompt),
            max_tokens=2 * num_steps + 100,
            sampling=SamplingParams(temperature=0.0),
        )
        for i, prompt in enumerate(rows)
    ]


def _median_step(step: Callable[[], int], num_rows: int, num_steps: int) -> float:
    taken: list[float] = []
    for _ in range(2 * num_steps + 90):
        began = time.perf_counter()
        if step() == num_rows:
            taken.append(time.perf_counter() - began)
        if len(taken) == num_steps:
            break
    return statistics.median(taken)


def cells(rounds: Sequence[Sequence[float]]) -> list[str]:
    """Milliseconds of mlx-lm's step, then each other step ÷ mlx-lm's, with ranges.

    Args:
        rounds: Seconds of a step of each contender, mlx-lm's first.
    """
    others = range(1, len(rounds[0]))
    return [
        with_range([1e3 * each[0] for each in rounds], ".2f"),
        *(with_range([each[k] / each[0] for each in rounds], ".3f") for k in others),
    ]


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.decoding", description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rows", type=int, nargs="+", default=list(NUM_ROWS), metavar="N")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    settings = Settings(model=arguments.model, max_batch=max(arguments.rows), prompt_cache_gb=0)
    engine = MLXEngine(settings, model_folder.find(settings))
    table = Table(["rows", "prompts", "mlx-lm, ms a step", "÷ mlx-lm: the batch", "the loop"])
    for num_rows in arguments.rows:
        for is_even in (True, False) if num_rows > 1 else (True,):
            rows = prompts(num_rows, is_even=is_even)
            raw(engine, rows, 5)
            wait_until_quiet(PATIENCE_SECONDS)
            rounds = [
                [measure(engine, rows, arguments.steps) for measure in (raw, batch, loop)]
                for _ in range(arguments.rounds)
            ]
            table.add([str(num_rows), "even" if is_even else "uneven", *cells(rounds)])
    say(f"medians and ranges of {arguments.rounds} interleaved rounds of {arguments.steps} steps")
    return 0


if __name__ == "__main__":
    sys.exit(main())
