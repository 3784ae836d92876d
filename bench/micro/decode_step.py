"""What each part of the decode step's speed is worth: fused projections, the compiled forward pass, and both, in one process.

`python -m bench.micro.decode_step` interleaves rounds of the same greedy sequences on the same weights. The compiled forward pass needs CUDA;
elsewhere only fused projections are compared. MLX reads its limits of a command buffer at start: to compare these, run it again with
`MLX_MAX_OPS_PER_BUFFER` and `MLX_MAX_MB_PER_BUFFER`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm

from bench.decoding import prompts
from bench.harness.table import Table, say
from common.protocol import SamplingParams
from common.settings import Settings
from worker.mlx.batch import Batch, make_sampler
from worker.mlx.decoding.compiled_forward import compiled_forward
from worker.mlx.decoding.decode_batch import BatchSequence
from worker.mlx.fused_projections import fuse_projections
from worker.mlx.model import has_gpu
from worker.models import model_folder
from worker.sampling.sequence_sampler import SequenceSampler

NUM_ROWS = (1, 8, 32)
MAX_WARM_UP_STEPS = 200


def make_batch(model: Any, max_rows: int, *, is_compiled: bool) -> Batch:
    """A batch of the worker."""
    return Batch(
        model,
        eos_token_ids=[],
        max_sequences=max_rows,
        step_tokens=2048,
        sampler=make_sampler(model.args.vocab_size, on_device=has_gpu()),
        on_cpu=not has_gpu(),
        compiled=compiled_forward(model) if is_compiled else None,
    )


def step_seconds(batch: Batch, num_rows: int, num_steps: int) -> float:
    """The median of decode steps in which all sequences take part."""
    sampling = SamplingParams(temperature=0.0)
    sequences = [
        BatchSequence(str(row), token_ids, MAX_WARM_UP_STEPS + num_steps, SequenceSampler(sampling))
        for row, token_ids in enumerate(prompts(num_rows, is_even=False))
    ]
    for sequence in sequences:
        batch.insert(sequence)
    for _ in range(MAX_WARM_UP_STEPS):
        if len(batch.step()) == num_rows:
            break
    times = []
    for _ in range(num_steps):
        began = time.perf_counter()
        batch.step()
        times.append(time.perf_counter() - began)
    for sequence in sequences:
        batch.remove(sequence)
    return statistics.median(times)


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.micro.decode_step", description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rows", type=int, nargs="+", default=list(NUM_ROWS), metavar="N")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    settings = Settings(model=arguments.model)
    folder = model_folder.find(settings) or Path(settings.model)
    plain, fused = (mlx_lm.load(str(folder))[0] for _ in range(2))
    fuse_projections(fused)
    most = max(arguments.rows)
    batches = {
        "plain": make_batch(plain, most, is_compiled=False),
        "fused": make_batch(fused, most, is_compiled=False),
    }
    if mx.cuda.is_available():
        batches["compiled"] = make_batch(plain, most, is_compiled=True)
        batches["both"] = make_batch(fused, most, is_compiled=True)
    names = list(batches)
    table = Table(["rows", "plain, ms a step", *(f"plain ÷ {name}" for name in names[1:])])
    for num_rows in arguments.rows:
        for batch in batches.values():
            step_seconds(batch, num_rows, 5)
        rounds: dict[str, list[float]] = {name: [] for name in names}
        for number in range(arguments.rounds):
            shift = number % len(names)
            for name in (*names[shift:], *names[:shift]):
                rounds[name].append(step_seconds(batches[name], num_rows, arguments.steps))
        cells = []
        for name in names[1:]:
            ratios = [a / b for a, b in zip(rounds["plain"], rounds[name], strict=True)]
            cells.append(f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})")
        table.add([str(num_rows), f"{1e3 * statistics.median(rounds['plain']):.2f}", *cells])
    say(f"medians and ranges of {arguments.rounds} interleaved rounds of {arguments.steps} steps")
    return 0


if __name__ == "__main__":
    sys.exit(main())
