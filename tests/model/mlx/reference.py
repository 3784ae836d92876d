"""Greedy jobs, and the tokens that mlx-lm itself generates for them, with which tests compare the worker's."""

from __future__ import annotations

from typing import Any

from mlx_lm.generate import BatchGenerator

from common.protocol import GenerationJob, SamplingParams, TokenPrompt
from worker.mlx.engine import MLXEngine


def greedy_job(job_id: str, prompt: list[int], max_tokens: int, **sampling: Any) -> GenerationJob:
    """A job for `MLXEngine.insert`."""
    return GenerationJob(
        job_id=job_id,
        model="m",
        channel="c",
        prompt=TokenPrompt(prompt),
        max_tokens=max_tokens,
        sampling=SamplingParams(temperature=0, **sampling),
    )


def mlx_lm_token_ids(engine: MLXEngine, prompt: list[int], num_tokens: int) -> list[int]:
    """The greedy token ids of mlx-lm's own batch, with only this prompt in it."""
    generator: Any = BatchGenerator(engine._model)
    generator.insert([prompt], max_tokens=[num_tokens])
    found: list[int] = []
    while len(found) < num_tokens:
        found += [response.token for response in generator.next()[1]]
    return found
