"""Warm-up of the device sampler: one step of each kind of plan, before the worker registers.

On CUDA and Metal, MLX compiles kernels that gather, scatter or fuse operations at first use. Which ones a step needs depends on the
parameters of its sequences: without this, the first request with a new combination would stall all others. Called by `worker.mlx.engine`.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from common.protocol import SamplingParams
from worker.mlx.sampling.choose import PlanKey, make_choose
from worker.mlx.sampling.plan_builder import PlanBuilder
from worker.sampling.masks import ALL_ALLOWED
from worker.sampling.sequence_sampler import SequenceSampler

log = logging.getLogger(__name__)

_NUM_ROWS = 3
_DRAWN = SamplingParams()
_TOP_P = SamplingParams(top_p=0.9)
_TOP_K = SamplingParams(top_k=5)
_XTC = SamplingParams(xtc_probability=0.5)
_GREEDY = SamplingParams(temperature=0.0)
_PENALIZED = SamplingParams(temperature=0.0, frequency_penalty=0.5)
_BIASED = SamplingParams(temperature=0.0, logit_bias={0: 1.0})
_REPETITION = SamplingParams(temperature=0.0, repetition_penalty=1.1)
_MIN_TOKENS = SamplingParams(temperature=0.0, min_tokens=9)


class _Free:
    """A matcher that needs a mask, which allows everything."""

    is_open = False

    def advance(self, token_id: int) -> None:
        """See `worker.sampling.sequence_sampler.Matcher`."""

    def fill(self, words: Any) -> None:
        words[:] = ALL_ALLOWED


@dataclass(frozen=True, slots=True)
class _Kind:
    """A plan.

    Attributes:
        samplings: How its sequences are sampled, in turn.
        num_top: How many of the most likely tokens they report.
        num_matchers: How many of them have matchers.
    """

    samplings: tuple[SamplingParams, ...]
    num_top: int | None = None
    num_matchers: int = 0


_COMMON_KINDS = (
    _Kind((_DRAWN,)),
    _Kind((_TOP_P,)),
    _Kind((_TOP_P, _GREEDY, _GREEDY)),
    _Kind((_TOP_P, _GREEDY, _GREEDY), 2),
    _Kind((_TOP_P,), num_matchers=1),
    _Kind((_GREEDY,), num_matchers=1),
    _Kind((_GREEDY,), num_matchers=3),
    _Kind((_GREEDY,), 20),
    _Kind((_PENALIZED, _TOP_P)),
    _Kind((_PENALIZED, _TOP_P), 2, num_matchers=1),
)
_RARE_KINDS = (
    _Kind((_TOP_K, _GREEDY)),
    _Kind((_XTC, _GREEDY, _GREEDY)),
    _Kind((_XTC,)),
    _Kind((_REPETITION,), 20),
    _Kind((_PENALIZED,), 20),
    _Kind((_DRAWN, _XTC), 20, num_matchers=1),
    _Kind((_PENALIZED, _TOP_P), 2, num_matchers=3),
    _Kind((_BIASED, _DRAWN), 0),
    _Kind((_BIASED, _MIN_TOKENS, _PENALIZED), 2),
)


@dataclass(slots=True)
class _Dummy:
    """A `worker.mlx.sampling.plan.SampledSequence`."""

    sampler: SequenceSampler
    token_ids: list[int]
    num_cached: int


def warm_up(builder: PlanBuilder, vocab_size: int, dtype: mx.Dtype, *, compiles: bool) -> set[PlanKey]:
    """Choose the tokens of dummy sequences. A failure is logged, and does not keep the worker from starting.

    Args:
        dtype: Of the model's logits.
        compiles: Whether the functions of common kinds are compiled too.

    Returns:
        The structures of the functions that were compiled.
    """
    compiled: set[PlanKey] = set()
    start_mono = time.monotonic()
    logits = mx.zeros((_NUM_ROWS, vocab_size), dtype)
    inputs = mx.zeros(_NUM_ROWS, mx.uint32)
    try:
        for kind in (*_COMMON_KINDS, *_RARE_KINDS):
            is_compiled = compiles and kind in _COMMON_KINDS
            plan = builder.build(_sequences(kind), _NUM_ROWS, None)
            masks = plan.masks()
            key = plan.masked_key if masks else plan.key
            choose = make_choose(key)
            for function in (choose, mx.compile(choose)) if is_compiled else (choose,):
                mx.eval(function(logits, inputs, plan.state, plan.constants | masks))
            if is_compiled:
                compiled.add(key.structure())
    except Exception:
        log.exception("the sampler's warm-up failed; the worker starts without it")
    else:
        log.info("warmed up the sampler in %.1f s", time.monotonic() - start_mono)
    return compiled


def _sequences(kind: _Kind) -> list[_Dummy]:
    samplings = (kind.samplings * _NUM_ROWS)[:_NUM_ROWS]
    matchers = [_Free() if row < kind.num_matchers else None for row in range(_NUM_ROWS)]
    return [
        _Dummy(SequenceSampler(sampling, matcher=matcher, num_top_logprobs=kind.num_top), [0, 0], 1)
        for sampling, matcher in zip(samplings, matchers, strict=True)
    ]
