"""A worker without a model: `python -m bench.harness.synthetic_worker --name MODEL_ID --steps-per-second R`.

For benchmarks, capacity planning and tests: the real worker with a synthetic engine. Token k of a stream has the text " k" (k
from 1), so that a client can check that none is missing, repeated or out of order. With `--obey`, the end of a prompt can request
a fault: "crash 5" kills the worker before that sequence's fifth token, "hang 5" makes the step hang, "raise 5" makes it
raise, "fail 5" fails that sequence, "hang 0" hangs while the prompt is encoded.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable

from common.errors import StartupError, invalid
from common.protocol import ChatPrompt, GenerationJob, TextPrompt, TokenPrompt
from common.settings import Settings
from worker.__main__ import WorkerFlags, run
from worker.loop.engine import InsertResult, ModelInfo, SequenceFailure, StepEvent, StepToken

CONTEXT_LENGTH = 1_000_000
VOCAB_SIZE = 1_000_000


class SyntheticEngine:
    """An engine that generates one token per sequence and step; the k-th has the id k and the text " k".

    Args:
        steps_per_second: 0: flat out.
        first_token_at_once: A new sequence's first token does not wait for the next step, so that time to first token is
            the transport's alone.
        timestamps: The k-th token's text is " k@T", T being the Unix time in microseconds at which its step ended, so that a
            client on the same machine can measure latency.
        obey: Prompts can request faults; see the module.
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
        self._faults: dict[str, tuple[str, int]] = {}  # by job id: kind, and before which token
        self._clock, self._sleep = clock, sleep
        self._next_step_at = 0.0
        self._sequences: dict[str, list[int]] = {}  # by job id: tokens so far, max tokens
        self._new: list[str] = []

    @property
    def num_sequences(self) -> int:
        return len(self._sequences)

    @property
    def burst_wait_seconds(self) -> float:
        return 0.0

    def encode(self, job: GenerationJob) -> list[int]:
        if job.echo or job.grammar or job.tool_use:
            raise invalid("The synthetic worker only counts: no echo, no grammar, no tools.")
        if self._obey and _requested_fault(job.prompt) == ("hang", 0):
            self._sleep(3600)
        num_tokens = max(1, len(job.prompt.text.split())) if isinstance(job.prompt, TextPrompt) else 1
        if num_tokens >= self.info.context_length:
            raise invalid("The prompt is too long.", "prompt", "context_length_exceeded")
        return [0] * num_tokens

    def make_prompt_tokenizer(self) -> SyntheticPromptTokenizer:
        return SyntheticPromptTokenizer(is_obedient=self._obey, sleep=self._sleep)

    @property
    def is_over_memory(self) -> bool:
        return False

    def has_room(self, *_: object) -> bool:
        return True

    def insert(self, job: GenerationJob, prompt: list[int], replay: list[int]) -> InsertResult:
        limit = self.info.context_length
        max_tokens = limit if job.max_tokens is None else min(job.max_tokens, limit)
        inserted = InsertResult(
            len(prompt), max_tokens, replayed_texts=[f" {token_id}" for token_id in replay]
        )
        if not max_tokens:
            return inserted
        if not self._sequences:  # after an idle time, steps are not made up for
            self._next_step_at = self._clock()
        self._sequences[job.job_id] = [len(replay), max_tokens]
        self._new.append(job.job_id)
        if self._obey and (requested := _requested_fault(job.prompt)):
            self._faults[job.job_id] = requested
        return inserted

    def remove(self, job_id: str) -> None:
        self._sequences.pop(job_id, None)
        self._faults.pop(job_id, None)

    def step(self) -> list[StepEvent]:
        new, self._new = [job_id for job_id in self._new if job_id in self._sequences], []
        if new and self._first_token_at_once:
            return self._next_tokens(new)
        if self._period_seconds:
            wait_seconds = self._next_step_at - self._clock()
            if wait_seconds > 0:
                # Short sleeps, so that new sequences are noticed, as by an engine that prefills between steps.
                self._sleep(min(wait_seconds, 0.002) if self._first_token_at_once else wait_seconds)
                if self._first_token_at_once and self._clock() < self._next_step_at:
                    return []
            self._next_step_at = max(self._next_step_at + self._period_seconds, self._clock() - 0.05)
        return self._next_tokens(list(self._sequences))

    def _next_tokens(self, job_ids: list[str]) -> list[StepEvent]:
        mark = f"@{time.time_ns() // 1000}" if self._timestamps else ""
        failures = self._inject_faults(job_ids) if self._faults else []
        return [self._next_token(job_id, mark) for job_id in job_ids if job_id in self._sequences] + failures

    def _inject_faults(self, job_ids: list[str]) -> list[StepEvent]:
        """Inject the faults that sequences of this step requested."""
        failures: list[StepEvent] = []
        for job_id in job_ids:
            kind, before = self._faults.get(job_id, ("", 0))
            if not kind or self._sequences[job_id][0] + 1 < before:
                continue
            match kind:
                case "crash":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "hang":
                    self._sleep(3600)
                case "raise":
                    self._sequences.clear()
                    self._faults.clear()
                    raise RuntimeError("a requested fault")
                case _:
                    self.remove(job_id)
                    failures.append(SequenceFailure(job_id, RuntimeError("a requested fault")))
        return failures

    def _next_token(self, job_id: str, mark: str) -> StepToken:
        counts = self._sequences[job_id]
        counts[0] += 1
        num_tokens, max_tokens = counts
        is_done = num_tokens >= max_tokens
        if is_done:
            del self._sequences[job_id]
        return StepToken(job_id, num_tokens, f" {num_tokens}{mark}", "length" if is_done else None)


class SyntheticPromptTokenizer:
    """Splits text into words; the k-th has the id k and, as text, " k". See `worker.loop.engine.PromptTokenizer`.

    Args:
        is_obedient: A prompt that ends with "crash 0" or "hang 0" requests that fault.
    """

    def __init__(self, *, is_obedient: bool, sleep: Callable[[float], None]) -> None:
        self._is_obedient = is_obedient
        self._sleep = sleep

    def encode(self, prompt: ChatPrompt | TextPrompt | TokenPrompt, **_: object) -> list[int]:
        match _requested_fault(prompt) if self._is_obedient else None:
            case ("crash", 0):
                os.kill(os.getpid(), signal.SIGKILL)
            case ("hang", 0):
                self._sleep(3600)
        return list(range(1, len(_last_text(prompt).split()) + 1))

    def token_strings(self, token_ids: list[int]) -> list[str]:
        return [str(token_id) for token_id in token_ids]

    def decode(self, token_ids: list[int]) -> str:
        return "".join(f" {token_id}" for token_id in token_ids)


def _last_text(prompt: ChatPrompt | TextPrompt | TokenPrompt) -> str:
    if isinstance(prompt, ChatPrompt):
        return str(prompt.messages[-1].get("content"))
    return prompt.text if isinstance(prompt, TextPrompt) else ""


def _requested_fault(prompt: ChatPrompt | TextPrompt | TokenPrompt) -> tuple[str, int] | None:
    """The fault that the last two words of a prompt request: its kind, and before which token."""
    found = re.search(r"\b(crash|hang|raise|fail) (\d+)$", _last_text(prompt))
    return (found[1], int(found[2])) if found else None


def main(argv: list[str] | None = None) -> int:
    """Run a synthetic worker; the exit status."""
    flags = WorkerFlags(
        "python -m bench.harness.synthetic_worker", "A worker with a synthetic engine instead of a model."
    )
    flags.parser.add_argument("--steps-per-second", type=float, default=0.0, metavar="R", help="0: flat out")
    flags.parser.add_argument(
        "--first-token-at-once",
        action="store_true",
        help="generate a new request's first token immediately",
    )
    flags.parser.add_argument(
        "--timestamps",
        action="store_true",
        help="add the end of the step to each token's text (Unix microseconds)",
    )

    flags.parser.add_argument(
        "--obey", action="store_true", help="prompts can request faults, such as 'crash 5'"
    )

    flags.parser.add_argument("--context-length", type=int, default=CONTEXT_LENGTH, metavar="N")

    def make_engine(settings: Settings) -> SyntheticEngine:
        options = flags.arguments
        if options.steps_per_second < 0:
            raise StartupError(f"--steps-per-second must be at least 0, not {options.steps_per_second}")
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
