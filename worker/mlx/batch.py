"""How rows are read and decoded together: mlx-lm's `BatchGenerator`, or one row after another where a model cannot batch.

Used by `mlx_engine` alone. Both kinds take rows with a `SequenceSampler` each and know which row is which when a step's tokens
are chosen. mlx-lm 0.32 calls a shared sampler once for a whole batch, a sampler of a row's own once a row.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from worker.mlx.prefill import MAX_PROMPTS, PrefillBudget
from worker.sampling.sampler import BatchSampler, SequenceSampler


class Response(Protocol):
    """What a step says of a row; mlx-lm's `GenerationBatch.Response`, in what is read of it."""

    @property
    def uid(self) -> int: ...
    @property
    def token(self) -> int: ...
    @property
    def logprobs(self) -> Any: ...
    @property
    def finish_reason(self) -> Literal["stop", "length"] | None: ...
    @property
    def prompt_cache(self) -> list[Any] | None: ...
    @property
    def all_tokens(self) -> list[int] | None: ...


@dataclass(frozen=True, slots=True)
class NewRow:
    """A row that is to be read and decoded.

    Attributes:
        token_ids: What is to be read, at least one, behind `cached_ids`.
        max_tokens: To be generated, at least 1.
        processors: mlx-lm's logits processors of this row.
        cached_ids: What is in `caches` already.
    """

    token_ids: list[int]
    max_tokens: int
    sampler: SequenceSampler
    processors: list[Any]
    cached_ids: list[int] = field(default_factory=list)
    caches: list[Any] | None = None


class Batch:
    """See the module.

    Attributes:
        just_read: Rows whose prompts were read with the last step, but for the last token.

    Args:
        eos_token_ids: Each ends a row.
        step_tokens: Most prompt tokens read between two decode steps.
        on_host: Whether MLX computes on a CPU: tokens are chosen with NumPy then, see `worker.sampling.sampler`.
        wire: Whether mlx-lm may wire all of a Mac's recommended memory.
    """

    def __init__(
        self,
        model: Any,
        eos_token_ids: list[int],
        max_batch: int,
        step_tokens: int,
        *,
        on_host: bool,
        never_excluded: list[int],
        wire: bool,
    ) -> None:
        import mlx.core as mx
        from mlx_lm.generate import BatchGenerator

        from worker.mlx.backends.cpu_ops import FusedCpuOps
        from worker.mlx.backends.cuda_attention import PaddedAttention, cuda_kernel
        from worker.mlx.decode import DecodingBatch
        from worker.mlx.prompt_batch import ReadingBatch

        self._sampler = _sampler(on_host=on_host, never_excluded=never_excluded)
        self._generator = BatchGenerator(
            model,
            stop_tokens=[[token_id] for token_id in eos_token_ids],
            sampler=self._sample,
            completion_batch_size=max_batch,
            prefill_batch_size=min(max_batch, MAX_PROMPTS),
            prefill_step_size=step_tokens,
            stream=mx.default_stream(mx.default_device()),
        )
        decoding = DecodingBatch.empty(model, self._sample)
        decoding.wants_logprobs = self._wants_logprobs
        decoding.max_rows = max_batch
        if on_host:
            decoding.fewer = FusedCpuOps()
        elif mx.cuda.is_available():
            decoding.attention = PaddedAttention(cuda_kernel())
        # mlx-lm has no other way to give it these.
        self._generator._generation_batch = decoding  # noqa: SLF001
        self._generator._prompt_batch = ReadingBatch.empty(model, self._sample, step_tokens)  # noqa: SLF001
        self._rows: dict[int, SequenceSampler] = {}
        self._budget = PrefillBudget(step_tokens)
        # By row that does not decode yet: prompt tokens left to read; oldest first.
        self._reading: dict[int, int] = {}
        self._begun: list[int] = []  # those of them that mlx-lm has in its prompt batch, in its order
        self._has_decoded = False  # in the step under way
        self._read_at = 0.0
        self.just_read: list[int] = []
        if not wire:
            # It wires all of a Mac's recommended memory on its own; whole-machine panics came with it (mlx #3186).
            self._generator.close()

    @property
    def burst_wait_seconds(self) -> float:
        """See `worker.loop.engine.Engine`."""
        return self._budget.burst_wait_seconds

    @property
    def cache_bytes(self) -> int:
        """What the caches of decoding rows take."""
        return sum(cache.nbytes for cache in self._generator._generation_batch.prompt_cache)  # noqa: SLF001

    @property
    def copy_tokens(self) -> int:
        """See `worker.mlx.prefill.PrefillBudget`."""
        return self._budget.copy_tokens

    def close(self) -> None:
        """Give back what mlx-lm changed of the process: the next batch takes what it finds for the state before."""
        self._generator.close()

    def is_reading(self, uid: int) -> bool:
        """Whether a row's prompt is not whole yet."""
        return uid in self._reading

    def caches(self, uid: int) -> tuple[list[int], list[Any]]:
        """What a row has read so far, and its caches, cut out of the batch's; not computed yet."""
        caches, token_ids = self._generator.extract_cache([uid])[uid]
        return list(token_ids), caches

    def insert(self, row: NewRow) -> int:
        """Take a row; its id."""
        (uid,) = self._generator.insert(
            [row.token_ids],
            max_tokens=[row.max_tokens],
            caches=None if row.caches is None else [row.caches],
            all_tokens=[list(row.cached_ids)],
            logits_processors=[row.processors],
        )
        self._rows[uid] = row.sampler
        self._reading[uid] = len(row.token_ids) - 1  # mlx-lm reads the last one in the first decode step
        return int(uid)

    def remove(self, uid: int) -> None:
        """Let go of a row."""
        self._generator.remove([uid])
        if self._reading.pop(uid, None) is not None and uid in self._begun:
            self._begun.remove(uid)
        self._rows.pop(uid, None)

    def next(self) -> list[Response]:
        """One step: a token of each row that is decoding, and some more of the prompts."""
        self._has_decoded = False
        self.just_read = []
        if not self._rows:
            return []
        if not self._reading or self._may_rest():
            self._generator.prefill_batch_size = 0  # mlx-lm takes none from its line
            responses = self._generator.next()[1]
        else:
            responses = self._read_and_decode()
        for response in responses:
            if response.finish_reason is not None:
                del self._rows[response.uid]
        return list(responses)

    def _wants_logprobs(self, uid: int) -> bool:
        return self._rows[uid].wants_logprobs

    def _sample(self, logprobs: Any) -> Any:
        """Called by mlx-lm with (rows, vocab): for the rows that decode, then for newcomers that take a step of their own."""
        generator = self._generator
        uids = generator._generation_batch.uids  # noqa: SLF001 (nothing else tells the order of the rows)
        if self._has_decoded or not uids:
            left = generator._prompt_batch.uids  # noqa: SLF001
            uids = [uid for uid in self._begun if uid not in left]
        self._has_decoded = True
        if len(uids) != len(logprobs):
            raise RuntimeError(f"mlx-lm samples {len(logprobs)} rows where {len(uids)} are known")
        return _sampled(self._sampler, [self._rows[uid] for uid in uids], logprobs)

    def _may_rest(self) -> bool:
        num_decoding = len(self._rows) - len(self._reading)
        since_seconds = time.perf_counter() - self._read_at
        return not self._begun and self._budget.may_rest(len(self._reading), num_decoding, since_seconds)

    def _read_and_decode(self) -> list[Any]:
        left_before = dict(self._reading)
        self._plan()
        with self._generator.stats() as stats:
            prompts, responses = self._generator.next()
        num_read = []
        for prompt in prompts:
            if prompt.end_of_prompt:  # one of a single token
                self._was_read(prompt.uid)
            else:
                num_done, num_all = prompt.progress
                self._reading[prompt.uid] = num_all - num_done - 1
                num_read.append(left_before[prompt.uid] - self._reading[prompt.uid])
        if num_read:
            self._budget.observe(len(num_read) * max(num_read), stats.prompt_time)
            self._read_at = time.perf_counter()
        self._join()
        return list(responses)

    def _join(self) -> None:
        """Rows whose prompts are whole but for the last token are to decode in the next step; in mlx-lm, one step later."""
        generator = self._generator
        under_way = generator._currently_processing  # noqa: SLF001 (by row: what is left to read, in parts, and two counts)
        whole = [place for place, (parts, *_) in enumerate(under_way) if [len(part) for part in parts] == [1]]
        if not whole:
            return
        last_tokens = [under_way[place][0][0] for place in whole]
        generator._currently_processing = [  # noqa: SLF001
            each for place, each in enumerate(under_way) if place not in whole
        ]
        joining = generator._prompt_batch.split(whole).generate(last_tokens)  # noqa: SLF001
        uids = list(joining.uids)
        generator._generation_batch.extend(joining)  # noqa: SLF001
        for uid in uids:
            self._was_read(uid)

    def _was_read(self, uid: int) -> None:
        del self._reading[uid]
        self._begun.remove(uid)
        self.just_read.append(uid)

    def _plan(self) -> None:
        """Tell mlx-lm which prompts to read in the next step, and how much of each."""
        waiting = [uid for uid in self._reading if uid not in self._begun]
        begun = [self._reading[uid] for uid in self._begun]
        plan = self._budget.plan(begun, [self._reading[uid] for uid in waiting])
        joining = [waiting[place] for place in plan.joining]
        generator = self._generator
        # mlx-lm takes the first ones of its line.
        line = sorted(generator._unprocessed_sequences, key=lambda sequence: sequence[0] not in joining)  # noqa: SLF001
        generator._unprocessed_sequences = deque(line)  # noqa: SLF001
        self._begun += joining
        generator.prefill_batch_size = max(1, len(self._begun))
        generator.prefill_step_size = plan.num_tokens


@dataclass(frozen=True, slots=True)
class _Response:
    """As `BatchGenerator`'s."""

    uid: int
    token: int
    logprobs: Any
    finish_reason: Literal["stop", "length"] | None
    prompt_cache: None = None
    all_tokens: None = None


class OneAtATime:
    """For models whose caches mlx-lm cannot put together: one row, with the same interface. Nothing is kept of it."""

    burst_wait_seconds = 0.0
    cache_bytes = 0
    copy_tokens = 0
    just_read: Sequence[int] = ()

    def __init__(
        self,
        model: Any,
        eos_token_ids: list[int],
        step_tokens: int,
        *,
        on_host: bool,
        never_excluded: list[int],
    ) -> None:
        self._model = model
        self._eos_token_ids = set(eos_token_ids)
        self._step_tokens = step_tokens
        self._sampler = _sampler(on_host=on_host, never_excluded=never_excluded)
        self._uid = self._left = 0
        self._steps: Iterator[tuple[Any, Any]] = iter(())

    def close(self) -> None:
        """As `Batch.close`; there is nothing."""

    def is_reading(self, _uid: int) -> bool:
        """Never between two steps."""
        return False

    def caches(self, uid: int) -> tuple[list[int], list[Any]]:
        """As `Batch.caches`; never asked, since nothing was `just_read`."""
        raise NotImplementedError(f"row {uid} has no caches to be kept")

    def insert(self, row: NewRow) -> int:
        """Take a row; its id."""
        import mlx.core as mx
        from mlx_lm.generate import generate_step

        self._uid += 1
        self._left = row.max_tokens
        sampler = row.sampler
        self._steps = generate_step(
            mx.array(row.token_ids),
            self._model,
            max_tokens=row.max_tokens,
            sampler=lambda logprobs: _sampled(self._sampler, [sampler], logprobs),
            logits_processors=row.processors,
            prefill_step_size=self._step_tokens,
            prompt_cache=row.caches,
        )
        return self._uid

    def remove(self, uid: int) -> None:
        """Let go of a row."""
        if uid == self._uid:
            self._steps = iter(())

    def next(self) -> list[Response]:
        """The row's next token; all of its prompt is read before the first."""
        token, logprobs = next(self._steps, (None, None))
        if token is None:
            return []
        self._left -= 1
        reason: Literal["stop", "length"] | None
        reason = "stop" if token in self._eos_token_ids else "length" if self._left == 0 else None
        if reason is not None:
            self._steps = iter(())
        return [_Response(self._uid, token, logprobs, reason)]


def alone(row: SequenceSampler, processor: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """A logits processor whose error ends its own row and no other."""

    def guarded(token_ids: Any, logits: Any) -> Any:
        if row.error is None:
            try:
                return processor(token_ids, logits)
            except Exception as error:  # noqa: BLE001 (told by the engine)
                row.error = error
        return logits

    return guarded


def _sampler(*, on_host: bool, never_excluded: list[int]) -> BatchSampler:
    import mlx.core as mx

    return BatchSampler(np if on_host else mx, async_eval=mx.async_eval, xtc_special_token_ids=never_excluded)


def _sampled(sampler: BatchSampler, rows: list[SequenceSampler], logprobs: Any) -> Any:
    """mx.array (rows,) of token ids."""
    import mlx.core as mx

    values = logprobs if logprobs.dtype == mx.float32 else logprobs.astype(mx.float32)
    token_ids = sampler.sample(rows, values)
    if token_ids is None:
        return mx.argmax(logprobs, axis=-1)
    if isinstance(token_ids, np.ndarray):
        return mx.array(token_ids.astype(np.uint32))
    return token_ids.astype(mx.uint32)
