"""The other door to MLX: an `Engine` on mlx-lm's `BatchGenerator`.

The generation loop makes it on its thread and uses it there, the model's load included: MLX's streams and lazy arrays do
not cross threads. mlx-lm's integer `uid` stays in this file. Signatures of mlx-lm move between minor releases: this file
and `mlx_model` are what changes then.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from common.errors import invalid
from common.protocol import ChatPrompt, GenerationJob, SamplingParams, TextPrompt, TokenLogprob
from worker.loop.engine import InsertResult, ModelInfo, PromptEcho, SequenceFailure, StepEvent, StepToken
from worker.mlx import model as mlx_model
from worker.mlx.batch import Batch, NewRow, OneAtATime, Response, alone
from worker.mlx.memory import CacheMemory, expected_tokens
from worker.mlx.memory_share import MemoryShare
from worker.mlx.prefix_cache import Found, PrefixCache, should_wait_for
from worker.mlx.scoring import PromptScoring, most_likely
from worker.mlx.warm_up import warm_up
from worker.sampling.grammar import CompiledGrammar, GrammarCompiler, GrammarMatcher
from worker.sampling.sampler import SequenceSampler
from worker.sampling.thinking import wrap_for_thinking
from worker.text import answer_format, answer_parser, prompts
from worker.text.detokenizer import Detokenizer, TokenBytes

if TYPE_CHECKING:
    from common.settings import Settings

log = logging.getLogger(__name__)

_PROMPT_CACHE_SHARE = 1 / 8


@dataclass(slots=True)
class _Row:
    """One job.

    Attributes:
        token_ids: The prompt and what was generated elsewhere.
        uid: None before it has begun to be read.
        waits_for: Another row whose prompt begins as this one does, and is being read.
        scoring: Where the prompt is echoed with log-probabilities.
    """

    job: GenerationJob
    detokenizer: Detokenizer
    sampler: SequenceSampler
    token_ids: list[int]
    num_prompt: int
    num_done: int
    max_tokens: int
    inserted: InsertResult
    uid: int | None = None
    waits_for: int | None = None
    scoring: PromptScoring | None = None
    is_echoed: bool = True

    @property
    def expected_tokens(self) -> int:
        return expected_tokens(self.num_prompt, self.num_done, self.max_tokens)


class MLXEngine:
    """See `worker.loop.engine.Engine`.

    Raises:
        StartupError: The model cannot be loaded.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._share = MemoryShare(settings)
        loaded = mlx_model.load_model(settings, self._share.claim)
        self._model, self._tokenizer = loaded.model, loaded.tokenizer
        self._info = mlx_model.describe(loaded, settings.max_batch)
        self._token_bytes = TokenBytes(self._tokenizer)
        self._format = answer_format.detect_format(self._tokenizer)
        eos_token_ids = list(self._tokenizer.eos_token_ids)
        self._grammars = (
            GrammarCompiler(self._tokenizer, self._info.vocab_size, eos_token_ids) if eos_token_ids else None
        )
        self._rows: dict[str, _Row] = {}
        self._by_uid: dict[int, _Row] = {}
        self._memory_limit_bytes = self._share.limit_bytes()
        self._memory = mlx_model.cache_memory(loaded, self._memory_limit_bytes)
        # A prompt that can never fit is refused like one that is longer than the model's context.
        self._info = replace(self._info, context_length=self._memory.longest_row(self._info.context_length))
        self._max_prompt_chars = prompts.max_prompt_chars(self._tokenizer, self._info.context_length)
        self._generator = self._new_generator()
        self._prefixes = PrefixCache(_prompt_cache_bytes(settings, self._memory))
        warm_up(self, on_gpu=mlx_model.has_gpu())
        # How fast it was the first time is nothing to learn from.
        self._begin_anew()
        self._prefixes = PrefixCache(_prompt_cache_bytes(settings, self._memory))

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def num_sequences(self) -> int:
        return len(self._rows)

    @property
    def burst_wait_seconds(self) -> float:
        return self._generator.burst_wait_seconds

    def encode(self, job: GenerationJob) -> list[int]:
        # Rust's tokenizers let go of the interpreter meanwhile (tokenizers 0.23), and so does llguidance (1.9).
        self._compiled(job)  # which is kept for `insert`
        return prompts.tokenize(
            job, self._tokenizer, self._info.context_length, self._format, self._max_prompt_chars
        )

    def _follow_share(self) -> None:
        """Take account of workers that started or ended on this machine."""
        limit_bytes = self._share.limit_bytes()
        if limit_bytes != self._memory_limit_bytes:
            log.info("this worker may use %.1f GB of memory now", limit_bytes / 2**30)
            self._memory_limit_bytes = limit_bytes
            self._memory = self._memory.with_limit(limit_bytes)
            self._make_room()

    def has_room(self, job: GenerationJob, num_prompt: int, num_done: int) -> bool:
        self._follow_share()
        new = expected_tokens(num_prompt, num_done, self._max_tokens(job, num_prompt))
        return self._memory.fits([new, *(row.expected_tokens for row in self._rows.values())])

    @property
    def is_over_memory(self) -> bool:
        self._follow_share()
        return not self._memory.fits([row.num_prompt + row.num_done for row in self._rows.values()])

    def _max_tokens(self, job: GenerationJob, num_prompt: int) -> int:
        room = self._info.context_length - num_prompt
        return room if job.max_tokens is None else min(job.max_tokens, room)

    def insert(self, job: GenerationJob, prompt: list[int], replay: list[int]) -> InsertResult:
        max_tokens = self._max_tokens(job, len(prompt))
        detokenizer = self._token_bytes.new_detokenizer(after_template=isinstance(job.prompt, ChatPrompt))
        inserted = InsertResult(
            len(prompt),
            max_tokens,
            replayed_texts=[detokenizer.add(token_id) for token_id in replay],
            parser=answer_parser.make_parser(job, self._format, prompt, self._token_bytes),
        )
        sampler = SequenceSampler(
            job.sampling,
            num_sampled=len(replay),
            matcher=self._matcher(job, inserted),
            wants_logprobs=job.top_logprobs is not None,
        )
        sampler.observe(replay)
        num_prompt, num_done = len(prompt), len(replay)
        row = _Row(job, detokenizer, sampler, prompt + replay, num_prompt, num_done, max_tokens, inserted)
        if job.echo:
            row.is_echoed = False
            if job.top_logprobs is not None:
                row.scoring = PromptScoring(self._model, prompt, job.top_logprobs, self._info.vocab_size)
        elif max_tokens > num_done:
            self._begin(row)
        if job.echo or max_tokens > num_done:
            self._rows[job.job_id] = row
            self._make_room()
        return inserted

    def _make_room(self) -> None:
        """Rows come before what is kept of others."""
        if self._prefixes.num_bytes:
            rows = [row.expected_tokens for row in self._rows.values()]
            self._prefixes.shrink_to(self._memory.left_bytes(rows, self._generator.cache_bytes))

    def _compiled(self, job: GenerationJob) -> CompiledGrammar | None:
        """What the answer is held to.

        Raises:
            RequestError: 400; it cannot be compiled.
        """
        text = answer_format.answer_grammar(job, self._format)
        if text is None:
            return None
        param = "response_format" if job.tool_use is None else "tools"
        if self._grammars is None:
            raise invalid("This model has no end-of-text token, without which no answer has a form.", param)
        return self._grammars.compile(text, param)

    def _matcher(self, job: GenerationJob, inserted: InsertResult) -> Any:
        compiled = self._compiled(job)
        if compiled is None:
            return None
        is_thinking = inserted.parser is not None and inserted.parser.is_reasoning
        return wrap_for_thinking(GrammarMatcher(compiled), self._tokenizer, is_thinking=is_thinking)

    def _begin(self, row: _Row) -> None:
        """Read on where others have read before, or wait until one has."""
        found = self._prefixes.find(row.token_ids)
        if row.scoring is not None:
            found = Found(row.scoring.caches, row.num_prompt - 1)
        reading = [(uid, other) for uid, other in self._by_uid.items() if self._generator.is_reading(uid)]
        others = [other.token_ids for _, other in reading]
        place = should_wait_for(row.token_ids, found.num_cached, others, self._prefixes.min_tokens)
        if place is not None:
            row.waits_for = reading[place][0]
            return
        row.waits_for = None
        row.inserted.cached_tokens = 0 if row.scoring else min(found.num_cached, row.num_prompt)
        new = NewRow(
            row.token_ids[found.num_cached :],
            row.max_tokens - row.num_done,
            row.sampler,
            _logits_processors(row.job.sampling, row.sampler),
            row.token_ids[: found.num_cached],
            found.caches,
        )
        row.uid = self._generator.insert(new)
        self._by_uid[row.uid] = row

    def remove(self, job_id: str) -> None:
        row = self._rows.pop(job_id, None)
        if row is not None and row.uid is not None:
            del self._by_uid[row.uid]
            self._generator.remove(row.uid)

    def step(self) -> list[StepEvent]:
        try:
            for row in self._rows.values():
                if row.waits_for is not None and not self._generator.is_reading(row.waits_for):
                    self._begin(row)
            echoes = self._echo()
            responses = self._generator.next()
            self._prefixes.expect(self._generator.copy_tokens)
            for uid in self._generator.just_read:
                if self._prefixes.wants(self._by_uid[uid].token_ids):
                    self._prefixes.put(*self._generator.caches(uid))
        except Exception:
            self._begin_anew()
            raise
        tokens = self._tokens(responses)
        self._make_room()
        return [*echoes, *tokens]

    def _echo(self) -> list[PromptEcho]:
        """Go on with the first of the prompts that are echoed; it, when it is done."""
        row = next((row for row in self._rows.values() if not row.is_echoed), None)
        if row is None:
            return []
        if row.scoring is not None and not row.scoring.is_done:
            row.scoring.step()
            if not row.scoring.is_done:
                return []
        row.is_echoed = True
        echo = self._prompt_read(row)
        if row.max_tokens:
            self._begin(row)
        else:
            del self._rows[row.job.job_id]
        return [echo]

    def _prompt_read(self, row: _Row) -> PromptEcho:
        token_ids, scores = row.token_ids[: row.num_prompt], row.scoring.scores if row.scoring else []
        if isinstance(row.job.prompt, TextPrompt):
            # What a tokenizer puts before a text, such as a begin-of-text token, is no part of it.
            text, num_added = row.job.prompt.text, self._num_added(row.job.prompt.text, token_ids)
            token_ids, scores = token_ids[num_added:], scores[num_added:]
        else:
            detokenizer = self._token_bytes.new_detokenizer(after_template=False)
            text = "".join([*(detokenizer.add(i) for i in token_ids), detokenizer.flush()])
        if row.scoring is None or not token_ids:
            return PromptEcho(row.job.job_id, text)
        tokens = [self._logprob(token_ids[0], 0.0)]
        tokens += [self._logprob(i, score.logprob) for i, score in zip(token_ids[1:], scores, strict=True)]
        tops: list[list[TokenLogprob]] = [[], *([self._logprob(*b) for b in score.best] for score in scores)]
        return PromptEcho(row.job.job_id, text, tokens, tops)

    def _num_added(self, text: str, token_ids: list[int]) -> int:
        """How many tokens the tokenizer has put before the text's own."""
        plain = self._tokenizer.encode(text, add_special_tokens=False)
        if not plain:
            return len(token_ids)
        return next((k for k in range(len(token_ids)) if token_ids[k : k + len(plain)] == plain), 0)

    def _tokens(self, responses: list[Response]) -> list[StepEvent]:
        tokens: list[StepEvent] = [self._token(response) for response in responses]
        # What was drawn for a row that failed is worth nothing.
        failed = {job_id: row for job_id, row in self._rows.items() if row.sampler.error is not None}
        if not failed:
            return tokens
        tokens = [token for token in tokens if token.job_id not in failed]
        for job_id, row in failed.items():
            self.remove(job_id)
            tokens.append(SequenceFailure(job_id, row.sampler.error or RuntimeError("no reason")))
        return tokens

    def _token(self, response: Response) -> StepToken:
        row = self._by_uid[response.uid]
        token_id, reason = int(response.token), response.finish_reason
        row.num_done += 1
        logprobs = row.sampler.logprobs.popleft() if row.sampler.logprobs else response.logprobs
        text = "" if reason == "stop" else row.detokenizer.add(token_id)  # an end-of-text token is not text
        if reason is not None:
            text += row.detokenizer.flush()
            del self._rows[row.job.job_id], self._by_uid[response.uid]
            token_ids, caches = response.all_tokens, response.prompt_cache
            if token_ids is not None and caches is not None and self._prefixes.wants(token_ids):
                self._prefixes.put(token_ids, caches)
        if row.job.top_logprobs is None:
            return StepToken(row.job.job_id, token_id, text, reason)
        own, top = self._logprobs(logprobs, token_id, row.job.top_logprobs)
        return StepToken(row.job.job_id, token_id, text, reason, own, top)

    def _logprobs(
        self, logprobs: Any, token_id: int, num_top: int
    ) -> tuple[TokenLogprob, list[TokenLogprob]]:
        """The token's own log-probability and the `num_top` best, best first.

        Args:
            logprobs: mx.array or NumPy's (vocab,), natural log, computed with the step.
        """
        # NumPy, not MLX: an operation of MLX would wait in its stream behind the step that is already under way.
        values = np.array(_as_float32(logprobs), copy=False)
        ranked = most_likely(values, num_top)
        return self._logprob(token_id, float(values[token_id])), [self._logprob(*item) for item in ranked]

    def _logprob(self, token_id: int, logprob: float) -> TokenLogprob:
        # JSON has neither infinity nor NaN (max takes the first where it cannot compare): a token that was banned, and one of a
        # model whose numbers overflow, reports a number that underflows to probability 0.
        return TokenLogprob(token_id, max(-9999.0, logprob), self._token_bytes[token_id])

    def _begin_anew(self) -> None:
        """Without rows: what a failed step left half-done is not to be built upon."""
        with suppress(Exception):  # it may be what has failed
            self._generator.close()
        self._rows, self._by_uid, self._generator = {}, {}, self._new_generator()

    def _new_generator(self) -> Batch | OneAtATime:
        eos_token_ids = list(self._tokenizer.eos_token_ids)
        step_tokens = self._settings.prefill_step_tokens
        how: dict[str, Any] = {
            "on_host": not mlx_model.has_gpu(),
            "never_excluded": [*eos_token_ids, *self._tokenizer.encode("\n", add_special_tokens=False)],
        }
        if not mlx_model.can_batch(self._model):
            return OneAtATime(self._model, eos_token_ids, step_tokens, **how)
        max_batch, wire = self._info.max_batch, self._settings.wired_limit
        return Batch(self._model, eos_token_ids, max_batch, step_tokens, wire=wire, **how)


def _prompt_cache_bytes(settings: Settings, memory: CacheMemory) -> int:
    """A part of what rows have, unless it is said otherwise: rows that need it take it back, other processes do not."""
    if settings.prompt_cache_gb is not None:
        return int(settings.prompt_cache_gb * 2**30)
    return int(memory.room_bytes * _PROMPT_CACHE_SHARE)


def _as_float32(logprobs: Any) -> Any:
    if isinstance(logprobs, np.ndarray):
        return logprobs
    import mlx.core as mx

    # NumPy knows no bfloat16.
    return logprobs if logprobs.dtype == mx.float32 else logprobs.astype(mx.float32)


def _logits_processors(sampling: SamplingParams, row: SequenceSampler) -> list[Any]:
    """What needs the logits themselves; everything else is the sampler's."""
    if sampling.repetition_penalty == 1.0:
        return []
    from mlx_lm.sample_utils import make_logits_processors

    made = make_logits_processors(
        repetition_penalty=sampling.repetition_penalty,
        repetition_context_size=sampling.repetition_context_size,
    )
    return [alone(row, processor) for processor in made]
