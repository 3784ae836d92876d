"""A few short rows for nobody, before a worker says that it is there.

What is needed for the first time takes longer than ever again: kernels are compiled or loaded, weights read. Without this the
first users of a worker would wait for it; on CUDA some of it is compiled only when rows leave a batch, seconds that
everybody else in the batch waits for. On a CPU there is less of it: MLX has a few kernels compiled for one row and for several,
which it keeps in files.
"""

from __future__ import annotations

import logging
import time

from common.protocol import GenerationJob, SamplingParams, TokenPrompt
from worker.loop.engine import Engine

log = logging.getLogger(__name__)

_ROWS: tuple[tuple[SamplingParams, bool], ...] = (
    (SamplingParams(temperature=0.0), False),
    (SamplingParams(), False),
    (SamplingParams(top_p=0.9, seed=1), True),
    (SamplingParams(temperature=0.0, repetition_penalty=1.1), False),
    (SamplingParams(frequency_penalty=0.5, seed=2), False),
    (SamplingParams(temperature=0.0), False),
)
"""How tokens are chosen, and whether log-probabilities are asked for."""

_ROWS_ON_CPU = 2

_PROMPT_TOKENS = 12
_MIN_TOKENS = 6
_MIN_TOKENS_ON_CPU = 2
_STEPS_BEFORE_LATE = 3
_MAX_STEPS = 200


def warm_up(engine: Engine, *, on_gpu: bool) -> None:
    """Generate, with prompts of different lengths and rows that leave one by one, on a GPU with rows that come late too.

    It is no reason not to start if that fails: the log says why.
    """
    if on_gpu:
        log.info("warming up; on CUDA, what is needed is compiled the first time, which may take a minute")
    began = time.monotonic()
    numbers = range(len(_ROWS) if on_gpu else _ROWS_ON_CPU)
    min_tokens = _MIN_TOKENS if on_gpu else _MIN_TOKENS_ON_CPU
    jobs = [_job(number, engine.info.vocab_size, min_tokens + 2 * number) for number in numbers]
    try:
        for first in range(0, len(jobs), engine.info.max_batch):
            _generate(engine, jobs[first : first + engine.info.max_batch], some_late=on_gpu)
    except Exception:
        log.exception("the model could not be warmed up")
        for job, _ in jobs:
            engine.remove(job.job_id)
    else:
        log.info("warmed up in %.1f s", time.monotonic() - began)


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
    raise RuntimeError(f"{engine.num_sequences} rows have not ended after {_MAX_STEPS} steps")


def _job(number: int, vocab_size: int, max_tokens: int) -> tuple[GenerationJob, list[int]]:
    """A job and its prompt: any token ids, of another length for each row."""
    sampling, wants_logprobs = _ROWS[number]
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
