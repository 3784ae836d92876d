"""mlx-lm's `BatchGenerator` with nothing around it, in a process of its own: what a pool's speed is measured against.

`python -m bench.contest.raw_generator` loads the demo model (or MLXPOOL_MODEL) as a worker does, with the same BLAS, the same
batch and the same prefill, then reads one request a line on standard input and answers each with a line. The timed part
is the generator alone: no tokenizing, no text, no Redis. `RawGenerator` starts that process and sends it requests.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from types import TracebackType
from typing import Any, Self

import msgspec

from bench.harness.pool import ROOT
from bench.harness.table import percentile
from common.protocol import ChatPrompt, GenerationJob
from common.settings import Settings
from worker.mlx import model as mlx_model
from worker.models import model_folder
from worker.text import prompts


class Round(msgspec.Struct, frozen=True):
    """One request: generate from all prompts together."""

    prompts: list[str]
    max_tokens: int


class Result(msgspec.Struct, frozen=True):
    """The response to a `Round`.

    Attributes:
        num_tokens: Generated, by prompt.
        seconds: From the insertion of the prompts to the last token.
        first_token_seconds: To the first token of any.
        gaps_ms: Between the tokens of a sequence: the median, and the 99th percentile.
        token_ids: By prompt.
    """

    num_tokens: list[int]
    seconds: float
    first_token_seconds: float
    gaps_ms: tuple[float, float]
    token_ids: list[list[int]]


class RawGenerator:
    """The process, while a `with` block lasts."""

    def __init__(self, settings: dict[str, str] | None = None) -> None:
        """Start it, with settings as environment variables."""
        environ = {k: v for k, v in os.environ.items() if k != "MLXPOOL_REDIS_URL"} | (settings or {})
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.contest.raw_generator"],
            cwd=ROOT,
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def generate(self, texts: list[str], max_tokens: int) -> Result:
        """Run one round."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(msgspec.json.encode(Round(texts, max_tokens)) + b"\n")
        self._process.stdin.flush()
        return msgspec.json.decode(self._process.stdout.readline(), type=Result)


def _generate(loaded: mlx_model.LoadedModel, settings: Settings, request: Round) -> Result:
    import mlx.core as mx
    from mlx_lm.generate import BatchGenerator

    token_ids = [
        prompts.tokenize(_job(text), loaded.tokenizer, context_length=1_000_000) for text in request.prompts
    ]
    # With a worker's limits, and mlx-lm's own number of prompts at once.
    generator: Any = BatchGenerator(
        loaded.model,
        stop_tokens=[[token_id] for token_id in loaded.tokenizer.eos_token_ids],
        completion_batch_size=settings.max_batch,
        prefill_batch_size=min(settings.max_batch, 8),
        prefill_step_size=settings.prefill_step_tokens or 2048,
        stream=mx.default_stream(mx.default_device()),
    )
    generator.close()  # so that no memory stays wired, as in a worker
    began = time.perf_counter()
    uids = generator.insert(token_ids, max_tokens=[request.max_tokens] * len(token_ids))
    generated: dict[int, list[int]] = {uid: [] for uid in uids}
    num_open = len(uids)
    steps: list[tuple[float, int]] = []
    while num_open:
        _, responses = generator.next()
        if responses:
            steps.append((time.perf_counter() - began, len(responses)))
        for response in responses:
            generated[response.uid].append(response.token)
            num_open -= response.finish_reason is not None
    seconds = time.perf_counter() - began
    gaps = [1000 * (at - before) for (before, _), (at, n) in itertools.pairwise(steps) for _ in range(n)]
    return Result(
        [len(ids) for ids in generated.values()],
        seconds,
        steps[0][0],
        (percentile(gaps, 50), percentile(gaps, 99)),
        list(generated.values()),
    )


def _job(text: str) -> GenerationJob:
    return GenerationJob(
        job_id="raw", model="raw", channel="", prompt=ChatPrompt([{"role": "user", "content": text}])
    )


def main() -> int:
    """Answer until standard input ends; the exit status."""
    settings = Settings.load()
    loaded = mlx_model.load_model(settings, model_folder.find(settings))
    for line in sys.stdin.buffer:
        result = _generate(loaded, settings, msgspec.json.decode(line, type=Round))
        sys.stdout.buffer.write(msgspec.json.encode(result) + b"\n")
        sys.stdout.buffer.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
