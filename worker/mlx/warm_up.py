"""Warm-up: generate with dummy sequences before the worker registers.

Called by `MLXEngine` when it is created. The first use of anything is slow: MLX compiles or loads kernels and reads the weights. Without
a warm-up the first users would wait for that. On CUDA some kernels are compiled only when a sequence leaves a batch, which would
stall all others for seconds. On a CPU there is less to do: MLX has a few kernels compiled, for one sequence and for
several, and caches them in files. Independent of MLX: it uses the `Engine` protocol.
"""

from __future__ import annotations

import logging
import time

from common.protocol import GenerationJob, SamplingParams, TokenPrompt
from worker.loop.engine import Engine

log = logging.getLogger(__name__)

_DUMMIES: tuple[tuple[SamplingParams, bool], ...] = (
    (SamplingParams(temperature=0.0), False),
    (SamplingParams(), False),
    (SamplingParams(top_p=0.9, seed=1), True),
    (SamplingParams(temperature=0.0, repetition_penalty=1.1), False),
    (SamplingParams(frequency_penalty=0.5, seed=2), False),
    (SamplingParams(temperature=0.0), False),
)
"""Of each dummy sequence: how it is sampled, and whether it asks for log-probabilities."""

_NUM_DUMMIES_ON_CPU = 2

_PROMPT_TOKENS = 12
_MIN_TOKENS = 6
_MIN_TOKENS_ON_CPU = 2
_STEPS_BEFORE_LATE = 3
_MAX_STEPS = 200


def warm_up(engine: Engine, *, on_gpu: bool) -> None:
    """Generate with dummy sequences whose prompts differ in length and which finish one by one.

    On a GPU half of them join later than the others. A failure is logged and does not keep the worker from starting. No
    sequence is left in the engine.

    Args:
        engine: Without sequences.
    """
    if on_gpu:
        log.info(
            "warming up; on CUDA, kernels are compiled at first use, which may take a few minutes on a machine's first start"
        )
    start_mono = time.monotonic()
    numbers = range(len(_DUMMIES) if on_gpu else _NUM_DUMMIES_ON_CPU)
    min_tokens = _MIN_TOKENS if on_gpu else _MIN_TOKENS_ON_CPU
    jobs = [_make_dummy(number, engine.info.vocab_size, min_tokens + 2 * number) for number in numbers]
    try:
        for first in range(0, len(jobs), engine.info.max_batch):
            _generate(engine, jobs[first : first + engine.info.max_batch], some_late=on_gpu)
    except Exception:
        log.exception("the warm-up failed; the worker starts without it")
        for job, _ in jobs:
            engine.remove(job.job_id)
    else:
        log.info("warmed up in %.1f s", time.monotonic() - start_mono)


def _generate(engine: Engine, jobs: list[tuple[GenerationJob, list[int]]], *, some_late: bool) -> None:
    num_early = (len(jobs) + 1) // 2 if some_late else len(jobs)
    for job, prompt in jobs[:num_early]:
        engine.insert(job, prompt, [])
    if some_late:
        for _ in range(_STEPS_BEFORE_LATE):
            engine.step()
    for job, prompt in jobs[num_early:]:
        engine.insert(job, prompt, [])
    for _ in range(_MAX_STEPS):
        if engine.num_sequences == 0:
            return
        engine.step()
    raise RuntimeError(f"{engine.num_sequences} dummy sequences have not finished after {_MAX_STEPS} steps")


def _make_dummy(number: int, vocab_size: int, max_tokens: int) -> tuple[GenerationJob, list[int]]:
    """A job and its prompt: arbitrary token ids, of a different length for each `number`."""
    sampling, wants_logprobs = _DUMMIES[number]
    prompt = [(1 + number + i) % vocab_size for i in range(_PROMPT_TOKENS - number)]
    job = GenerationJob(
        job_id=f"warm-up-{number}",
        model="",
        channel="",
        prompt=TokenPrompt(prompt),
        max_tokens=max_tokens,
        sampling=sampling,
        top_logprobs=1 if wants_logprobs else None,
    )
    return job, prompt
