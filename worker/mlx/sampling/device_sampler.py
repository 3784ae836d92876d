"""Chooses a step's tokens on the device that computes the model: nothing but the chosen tokens and their scores is copied to the host.

Called by `worker.mlx.decoding.decode_batch`. On a GPU a step of a small model takes as long as the CPU needs to launch it, so a choice is few operations
for all rows, and its arrays stay on the device from step to step.

Without matchers, the forward pass and the choice are started together. With matchers there are two phases, as masks depend on the previous
tokens: the forward pass is started, then the previous tokens are read and the masks computed while the device is busy, then the
choice is started with the masks as an input.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat

import mlx.core as mx
import numpy as np

from worker.mlx.sampling.choose import Choose, PlanKey, make_choose
from worker.mlx.sampling.chosen import ChosenTokens, PreviousTokens, SampledToken
from worker.mlx.sampling.filters import Arrays
from worker.mlx.sampling.plan import Plan, SampledSequence
from worker.mlx.sampling.plan_builder import PlanBuilder
from worker.mlx.sampling.top_tokens import own_token_ids, unpack
from worker.mlx.sampling.warm_up import warm_up
from worker.sampling.scores import Score

_MAX_FUNCTIONS = 64
"""How many functions are cached: `mx.compile` keeps what it has compiled as long as its function."""

STEPS_BEFORE_COMPILING = 16
"""Uses of a function before it is compiled. Compiling takes as long as several steps; while many sequences join and leave, few functions
are used that often."""


@dataclass(slots=True)
class _Function:
    choose: Choose
    num_uses: int = 0


class DeviceSampler:
    """See the module; a `worker.mlx.sampling.chosen.StepSampler`.

    Args:
        vocab_size: Number of logits.
        xtc_special_token_ids: Tokens that XTC never excludes: line breaks and end of text, without which an answer would not end.
        eos_token_ids: End-of-text tokens, which `min_tokens` bans.
        compile_after: How many uses of a function come before it is compiled; None: none is compiled.
        compiles_new: Whether functions are compiled whose kernels the warm-up has not. On CUDA each of them takes a second or more,
            and all sequences would wait; on Metal it takes some ten milliseconds.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        xtc_special_token_ids: Sequence[int] = (),
        eos_token_ids: Sequence[int] = (),
        compile_after: int | None = STEPS_BEFORE_COMPILING,
        compiles_new: bool = True,
    ) -> None:
        self._builder = PlanBuilder(
            vocab_size, xtc_special_token_ids=xtc_special_token_ids, eos_token_ids=eos_token_ids
        )
        self._vocab_size = vocab_size
        self._compile_after = compile_after
        self._compiles_new = compiles_new
        self._warm: set[PlanKey] = set()
        self._plan: Plan | None = None
        self._functions: OrderedDict[PlanKey, _Function] = OrderedDict()

    def warm_up(self, dtype: mx.Dtype) -> None:
        """Use each kind of plan once, so that MLX compiles its kernels.

        Args:
            dtype: Of the model's logits.
        """
        compiles = self._compile_after is not None
        self._warm = warm_up(self._builder, self._vocab_size, dtype, compiles=compiles)

    def plan(self, sequences: Sequence[SampledSequence], num_rows: int | None = None) -> Plan:
        """The plan of the next step of these sequences; the latest one if they are still the same.

        Args:
            num_rows: Of the logits, if some rows are spare.
        """
        num_rows = len(sequences) if num_rows is None else num_rows
        if self._plan is None or not self._plan.fits(sequences, num_rows):
            self._plan = self._builder.build(sequences, num_rows, self._plan)
        return self._plan

    def reset(self) -> None:
        """See `StepSampler`."""
        self._plan = None

    def choose(
        self,
        sequences: Sequence[SampledSequence],
        inputs: mx.array,
        logits: mx.array,
        previous: PreviousTokens,
    ) -> ChosenTokens:
        """See `StepSampler`."""
        plan = self.plan(sequences, logits.shape[0])
        masks: Arrays = {}
        if plan.has_matchers:
            mx.async_eval(logits)
            previous.read()
            masks = plan.masks()
        function = self.function(plan.masked_key if masks else plan.key)
        return self.record(plan, *function(logits, inputs, plan.state, plan.constants | masks))

    def function(self, key: PlanKey) -> Choose:
        """The function of plans with this key, to be called once; compiled if it is used often."""
        function = self._functions.pop(key, None) or _Function(make_choose(key))
        self._functions[key] = function  # now the latest
        if len(self._functions) > _MAX_FUNCTIONS:
            self._functions.popitem(last=False)
        if function.num_uses == self._compile_after and self._is_worth_compiling(key):
            function.choose = mx.compile(function.choose)
        function.num_uses += 1
        return function.choose

    def _is_worth_compiling(self, key: PlanKey) -> bool:
        is_greedy = key == PlanKey(key.num_rows)  # one operation
        return not is_greedy and (self._compiles_new or key.structure() in self._warm)

    def record(self, plan: Plan, token_ids: mx.array, scores: list[mx.array], state: Arrays) -> ChosenTokens:
        """Start the computation of a choice made with this plan, and keep its state for the next step."""
        mx.async_eval(token_ids, scores, state)
        plan.advance(state)
        if not scores:
            return ChosenTokens(token_ids, lambda: _tokens(token_ids))
        return ChosenTokens(token_ids, lambda: _scored_tokens(scores[0], plan.reporting))


def _tokens(token_ids: mx.array) -> list[SampledToken]:
    found: list[int] = token_ids.tolist()  # type: ignore[assignment]
    return list(zip(found, repeat(None)))


def _scored_tokens(scores: mx.array, reporting: list[tuple[int, int]]) -> list[SampledToken]:
    packed = np.array(scores)
    found: list[Score | None] = [None] * len(packed)
    rows, num_top = zip(*reporting, strict=True)
    for row, score in zip(rows, unpack(packed[list(rows)], num_top), strict=True):
        found[row] = score
    return list(zip(own_token_ids(packed), found, strict=True))
