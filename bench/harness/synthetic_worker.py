"""A worker without a model: `python -m bench.harness.synthetic_worker --name MODEL_ID --steps-per-second R`.

For benchmarks, capacity planning and tests: everything is the real worker but the engine. Token k of a stream has the text
" k" (k from 1), so that a reader can see that none is missing, doubled or out of order. With `--obey`, a request's last
words can ask for misfortune: "crash 5" kills the worker before that row's fifth token, "hang 5" has the step hang,
"raise 5" has it raise, "fail 5" fails that row, "hang 0" hangs while its prompt is encoded.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable

from common.errors import StartupError, invalid
from common.protocol import ChatPrompt, GenerationJob, TextPrompt
from common.settings import Settings
from worker.__main__ import WorkerFlags, run
from worker.loop.engine import InsertResult, ModelInfo, SequenceFailure, StepEvent, StepToken

CONTEXT_LENGTH = 1_000_000
VOCAB_SIZE = 1_000_000


class SyntheticEngine:
    """One token a row and step; the k-th has the id k and the text " k".

    Args:
        steps_per_second: 0: flat out.
        first_token_at_once: A new row's first token does not wait for the next step: what a client then waits for is
            the transport alone.
        timestamps: The k-th token's text is " k@T", T the microseconds since 1970 when its step ended: a reader on the
            same machine knows how long it was on its way.
        obey: Misfortunes are to be had; see the module.
    """

    def __init__(
        self,
        max_batch: int,
        steps_per_second: float,
        *,
        first_token_at_once: bool = False,
        timestamps: bool = False,
        obey: bool = False,
        context_length: int = CONTEXT_LENGTH,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.info = ModelInfo(context_length, VOCAB_SIZE, max_batch, quantization="synthetic")
        self._period_seconds = 1.0 / steps_per_second if steps_per_second else 0.0
        self._first_token_at_once = first_token_at_once
        self._timestamps = timestamps
        self._obey = obey
        self._misfortunes: dict[str, tuple[str, int]] = {}  # by job id: what, and before which token
        self._clock, self._sleep = clock, sleep
        self._next_step_at = 0.0
        self._rows: dict[str, list[int]] = {}  # job id: tokens so far, tokens in all
        self._new: list[str] = []

    @property
    def num_sequences(self) -> int:
        return len(self._rows)

    @property
    def burst_wait_seconds(self) -> float:
        return 0.0

    def encode(self, job: GenerationJob) -> list[int]:
        if job.echo or job.grammar or job.tool_use:
            raise invalid("The synthetic worker only counts: no echo, no grammar, no tools.")
        if self._obey and _misfortune(job) == ("hang", 0):
            self._sleep(3600)
        num_tokens = max(1, len(job.prompt.text.split())) if isinstance(job.prompt, TextPrompt) else 1
        if num_tokens >= self.info.context_length:
            raise invalid("The prompt is too long.", "prompt", "context_length_exceeded")
        return [0] * num_tokens

    @property
    def is_over_memory(self) -> bool:
        return False

    def has_room(self, *_: object) -> bool:
        return True

    def insert(self, job: GenerationJob, prompt: list[int], replay: list[int]) -> InsertResult:
        most = self.info.context_length
        max_tokens = most if job.max_tokens is None else min(job.max_tokens, most)
        inserted = InsertResult(
            len(prompt), max_tokens, replayed_texts=[f" {token_id}" for token_id in replay]
        )
        if not max_tokens:
            return inserted
        if not self._rows:  # time in which there was nothing to do is not to be made good
            self._next_step_at = self._clock()
        self._rows[job.job_id] = [len(replay), max_tokens]
        self._new.append(job.job_id)
        if self._obey and (asked := _misfortune(job)):
            self._misfortunes[job.job_id] = asked
        return inserted

    def remove(self, job_id: str) -> None:
        self._rows.pop(job_id, None)
        self._misfortunes.pop(job_id, None)

    def step(self) -> list[StepEvent]:
        new, self._new = [job_id for job_id in self._new if job_id in self._rows], []
        if new and self._first_token_at_once:
            return self._next_tokens(new)
        if self._period_seconds:
            wait_seconds = self._next_step_at - self._clock()
            if wait_seconds > 0:
                # Short naps, so that a new row is seen: an engine that reads prompts between steps does as much.
                self._sleep(min(wait_seconds, 0.002) if self._first_token_at_once else wait_seconds)
                if self._first_token_at_once and self._clock() < self._next_step_at:
                    return []
            self._next_step_at = max(self._next_step_at + self._period_seconds, self._clock() - 0.05)
        return self._next_tokens(list(self._rows))

    def _next_tokens(self, job_ids: list[str]) -> list[StepEvent]:
        mark = f"@{time.time_ns() // 1000}" if self._timestamps else ""
        failures = self._suffer(job_ids) if self._misfortunes else []
        return [self._next_token(job_id, mark) for job_id in job_ids if job_id in self._rows] + failures

    def _suffer(self, job_ids: list[str]) -> list[StepEvent]:
        """Do what rows of this step asked for."""
        failures: list[StepEvent] = []
        for job_id in job_ids:
            what, at = self._misfortunes.get(job_id, ("", 0))
            if not what or self._rows[job_id][0] + 1 < at:
                continue
            match what:
                case "crash":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "hang":
                    self._sleep(3600)
                case "raise":
                    self._rows.clear()
                    self._misfortunes.clear()
                    raise RuntimeError("as asked")
                case _:
                    self.remove(job_id)
                    failures.append(SequenceFailure(job_id, RuntimeError("as asked")))
        return failures

    def _next_token(self, job_id: str, mark: str) -> StepToken:
        row = self._rows[job_id]
        row[0] += 1
        done = row[0] >= row[1]
        if done:
            del self._rows[job_id]
        return StepToken(job_id, row[0], f" {row[0]}{mark}", "length" if done else None)


def _misfortune(job: GenerationJob) -> tuple[str, int] | None:
    """What a request's last two words ask for."""
    prompt = job.prompt
    text = str(prompt.messages[-1].get("content")) if isinstance(prompt, ChatPrompt) else ""
    text = prompt.text if isinstance(prompt, TextPrompt) else text
    asked = re.search(r"\b(crash|hang|raise|fail) (\d+)$", text)
    return (asked[1], int(asked[2])) if asked else None


def main(argv: list[str] | None = None) -> int:
    """Run one; the exit status."""
    flags = WorkerFlags(
        "python -m bench.harness.synthetic_worker", "A worker without a model; see the module."
    )
    flags.parser.add_argument("--steps-per-second", type=float, default=0.0, metavar="R", help="0: flat out")
    flags.parser.add_argument(
        "--first-token-at-once",
        action="store_true",
        help="a new request's first token does not wait for a step",
    )
    flags.parser.add_argument(
        "--timestamps",
        action="store_true",
        help="each token's text says when its step ended (Unix microseconds)",
    )

    flags.parser.add_argument(
        "--obey", action="store_true", help="requests can ask for misfortune; see the module"
    )

    flags.parser.add_argument("--context-length", type=int, default=CONTEXT_LENGTH, metavar="N")

    def make_engine(settings: Settings) -> SyntheticEngine:
        options = flags.arguments
        if options.steps_per_second < 0:
            raise StartupError(f"--steps-per-second is at least 0, not {options.steps_per_second}")
        return SyntheticEngine(
            settings.max_batch,
            options.steps_per_second,
            first_token_at_once=options.first_token_at_once,
            timestamps=options.timestamps,
            obey=options.obey,
            context_length=options.context_length,
        )

    return run(flags, make_engine, argv)


if __name__ == "__main__":
    sys.exit(main())
