"""What mlx-lm itself generates, for tests of what the worker makes of it."""

from __future__ import annotations

from typing import Any

from mlx_lm.generate import BatchGenerator

from worker.mlx_engine import MLXEngine


def of_mlx_lm(engine: MLXEngine, prompt: list[int], num_tokens: int) -> list[int]:
    """Token ids of mlx-lm's own batch with that prompt alone, greedily."""
    generator: Any = BatchGenerator(engine._model)
    generator.insert([prompt], max_tokens=[num_tokens])
    found: list[int] = []
    while len(found) < num_tokens:
        found += [response.token for response in generator.next()[1]]
    return found
