"""An engine whose answers come from a script: everything of a worker is real, except the model.

Prompts are rendered and tokenized by the demo model's template and tokenizer, through the same `GenerationBuilder` as in the real
engine. Each answer is checked against the job's real grammar, token by token, and a job that another worker began continues
only if the replayed tokens are the beginning of its answer. Used by `tests.clients.scripted.worker`.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mlx_lm.utils import load_tokenizer

from common.errors import RequestError
from common.protocol import GenerationJob
from tests.clients.scripted.conversation import Conversation, Script, ScriptError, encode_answer
from worker.loop.engine import InsertResult, ModelInfo, PromptTokenizer, SequenceFailure, StepEvent, StepToken
from worker.mlx.generation import Generation, GenerationBuilder
from worker.sampling.grammar import num_words
from worker.text import answer_format
from worker.text.answer_format import CallFormat
from worker.text.detokenizer import TokenBytes

CONTEXT_LENGTH = 131_072
"""More than the demo model's: agents send tens of thousands of tokens."""


@dataclass(slots=True, eq=False)
class ScriptedSequence:
    """One job: its generation, and the complete answer.

    Attributes:
        token_ids: Of the complete answer, without the end-of-text token.
    """

    generation: Generation
    name: str
    token_ids: list[int]

    @property
    def middle(self) -> int:
        return len(self.token_ids) // 2


class ScriptedEngine:
    """See the module; an `Engine`.

    Args:
        folder: Of the model whose tokenizer and template are used.
        tokens_per_second: Of each sequence.
        record: Receives a line of JSON at the start, in the middle and at the end of each answer.
        holds: While this folder has a file with an answer's name, that answer stays in its middle.
    """

    def __init__(
        self,
        folder: Path,
        script: Script,
        *,
        max_batch: int,
        tokens_per_second: float,
        record: Path | None = None,
        holds: Path | None = None,
    ) -> None:
        tokenizer: Any = load_tokenizer(folder)
        self._tokenizer = tokenizer
        self._eos_token_id = min(tokenizer.eos_token_ids)
        self.info = ModelInfo(CONTEXT_LENGTH, len(tokenizer.get_vocab()), max_batch, quantization="scripted")
        self._builder = GenerationBuilder(tokenizer, TokenBytes(tokenizer), self.info)
        self._format = answer_format.detect_format(tokenizer)
        self._script = script
        self._period_seconds = 1.0 / tokens_per_second
        self._record_path, self._holds = record, holds
        self._sequences: dict[str, ScriptedSequence] = {}
        self._next_step_mono = 0.0

    @property
    def num_sequences(self) -> int:
        return len(self._sequences)

    @property
    def burst_wait_seconds(self) -> float:
        return 0.0

    @property
    def is_over_memory(self) -> bool:
        return False

    def has_room(self, *_: object) -> bool:
        return True

    def encode(self, job: GenerationJob) -> list[int]:
        return self._builder.encode(job)

    def make_prompt_tokenizer(self) -> PromptTokenizer:
        return self._builder.make_prompt_tokenizer()

    def insert(self, job: GenerationJob, prompt: list[int], replay: list[int]) -> InsertResult:
        room = self.info.context_length - len(prompt)
        max_tokens = room if job.max_tokens is None else min(job.max_tokens, room)
        generation = self._builder.build(job, prompt, replay, max_tokens)
        name, token_ids = self._answer(job)
        if replay != token_ids[: len(replay)]:
            self._record(job.job_id, name, "refused", len(replay))
            raise RequestError("The replayed tokens are not this conversation's answer.", status=500)
        if max_tokens > len(replay):
            self._sequences[job.job_id] = ScriptedSequence(generation, name, token_ids)
            self._record(job.job_id, name, "start", len(replay))
        return generation.insert_result

    def remove(self, job_id: str) -> None:
        self._sequences.pop(job_id, None)

    def step(self) -> list[StepEvent]:
        wait_seconds = self._next_step_mono - time.monotonic()
        if wait_seconds > 0:
            time.sleep(wait_seconds)
        self._next_step_mono = time.monotonic() + self._period_seconds
        ready = [(job_id, each) for job_id, each in self._sequences.items() if not self._is_held(each)]
        return [self._next_token(job_id, each) for job_id, each in ready]

    def _is_held(self, sequence: ScriptedSequence) -> bool:
        if self._holds is None or sequence.generation.num_answer_tokens != sequence.middle + 1:
            return False
        return (self._holds / sequence.name).exists()

    def _answer(self, job: GenerationJob) -> tuple[str, list[int]]:
        """The name and the tokens of a job's answer.

        Raises:
            RequestError: 400; the conversation is not what the script expects.
        """
        assert answer_format.choose_call_format(job, self._format) is not CallFormat.NATIVE
        try:
            conversation = Conversation.from_job(job)
            answer = self._script(conversation)
            text = encode_answer(answer, conversation.functions)
        except ScriptError as error:
            self._record(job.job_id, f"error: {error}", "refused", 0)
            raise RequestError(f"The script refuses this conversation: {error}") from None
        return answer.name, list(self._tokenizer.encode(text, add_special_tokens=False))

    def _next_token(self, job_id: str, sequence: ScriptedSequence) -> StepEvent:
        generation = sequence.generation
        index = generation.num_answer_tokens
        is_end = index == len(sequence.token_ids)
        token_id = self._eos_token_id if is_end else sequence.token_ids[index]
        try:
            self._check_grammar(generation, token_id)
        except Exception as error:  # noqa: BLE001 (any error is this sequence's)
            del self._sequences[job_id]
            self._record(job_id, f"{sequence.name}: {error}", "refused", index)
            return SequenceFailure(job_id, error)
        generation.num_answer_tokens += 1
        text = "" if is_end else generation.detokenizer.add(token_id)
        reason = "stop" if is_end else None
        if not is_end and generation.num_answer_tokens >= generation.max_tokens:
            reason = "length"
        if index == sequence.middle:
            self._record(job_id, sequence.name, "middle", index)
        if reason is not None:
            text += generation.detokenizer.flush()
            del self._sequences[job_id]
            self._record(job_id, sequence.name, "end", index)
        return StepToken(job_id, token_id, text, reason)  # type: ignore[arg-type]

    def _check_grammar(self, generation: Generation, token_id: int) -> None:
        """Advance the job's matcher, after checking that its mask allows the token, as the sampler would."""
        matcher = generation.sequence.sampler.matcher
        if matcher is None:
            return
        words = np.empty(num_words(self.info.vocab_size), np.uint32)
        matcher.fill(words)
        if not words[token_id // 32] >> np.uint32(token_id % 32) & np.uint32(1):
            text = self._tokenizer.decode([token_id])
            raise ScriptError(f"the grammar does not allow {text!r} at this point")
        matcher.advance(token_id)

    def _record(self, job_id: str, name: str, event: str, num_tokens: int) -> None:
        if self._record_path is None:
            return
        line = {
            "job_id": job_id,
            "answer": name,
            "event": event,
            "num_tokens": num_tokens,
            "pid": os.getpid(),
        }
        with self._record_path.open("a") as file:  # one write of a short line is atomic
            file.write(json.dumps(line) + "\n")
