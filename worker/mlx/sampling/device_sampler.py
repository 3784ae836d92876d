"""Chooses a step's tokens on the device that computes the model: nothing but the chosen tokens and their scores is copied to the host.

Called by `worker.mlx.decode`. On a GPU a step of a small model takes as long as the CPU needs to launch it, so a choice is few operations
for all rows, and its arrays stay on the device from step to step.

A step without matchers is one graph, forward pass and choice, and may be compiled as one: `plan`, `function`, `record`. With matchers it
has two phases, as masks depend on the previous tokens: the forward pass is started, then the previous tokens are read and the masks
computed while the device is busy, then the choice is started with the masks as an input.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from worker.mlx.sampling.choose import Choose, PlanKey, make_choose
from worker.mlx.sampling.chosen import ChosenTokens, PreviousTokens, SampledToken
from worker.mlx.sampling.filters import Arrays
from worker.mlx.sampling.plan import Plan, PlanBuilder, SampledSequence
from worker.mlx.sampling.top_tokens import own_token_ids, unpack
from worker.sampling.scores import Score

_MAX_COMPILED = 32
"""How many compiled functions are cached: `mx.compile` keeps what it has compiled as long as its function."""


class DeviceSampler:
    """See the module; a `worker.mlx.sampling.chosen.StepSampler`.

    Args:
        vocab_size: Number of logits.
        xtc_special_token_ids: Tokens that XTC never excludes: line breaks and end of text, without which an answer would not end.
        eos_token_ids: End-of-text tokens, which `min_tokens` bans.
        compiles: Whether `choose` compiles its functions.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        xtc_special_token_ids: Sequence[int] = (),
        eos_token_ids: Sequence[int] = (),
        compiles: bool = True,
    ) -> None:
        self._builder = PlanBuilder(
            vocab_size, xtc_special_token_ids=xtc_special_token_ids, eos_token_ids=eos_token_ids
        )
        self._compiles = compiles
        self._plan: Plan | None = None
        self._functions: OrderedDict[PlanKey, Choose] = OrderedDict()

    def plan(self, sequences: Sequence[SampledSequence], num_rows: int | None = None) -> Plan:
        """The plan of the next step of these sequences; the latest one if they are still the same.

        Args:
            num_rows: Of the logits, if some rows are spare.
        """
        num_rows = len(sequences) if num_rows is None else num_rows
        if self._plan is None or not self._plan.fits(sequences, num_rows):
            self._plan = self._builder.build(sequences, num_rows, self._plan)
        return self._plan

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
        function = self.function(plan.key._replace(is_masked=bool(masks)))
        return self.record(plan, *function(logits, inputs, plan.state, plan.constants | masks))

    def function(self, key: PlanKey) -> Choose:
        """The function of plans with this key; compiled unless the sampler was created otherwise.

        A graph that is compiled as a part of a larger one uses `make_choose` itself.
        """
        if not self._compiles:
            return make_choose(key)
        if key not in self._functions:
            self._functions[key] = mx.compile(make_choose(key))
            if len(self._functions) > _MAX_COMPILED:
                self._functions.popitem(last=False)
        self._functions.move_to_end(key)
        return self._functions[key]

    def record(self, plan: Plan, token_ids: mx.array, scores: list[mx.array], state: Arrays) -> ChosenTokens:
        """Start the computation of a step that was built with this plan, and keep its state for the next one."""
        mx.async_eval(token_ids, scores, state)
        plan.advance(state)
        if not scores:
            return ChosenTokens(token_ids, lambda: _tokens(token_ids))
        return ChosenTokens(token_ids, lambda: _scored_tokens(scores[0], plan.reporting))


def _tokens(token_ids: mx.array) -> list[SampledToken]:
    found: list[int] = token_ids.tolist()  # type: ignore[assignment]
    return [SampledToken(token_id, None) for token_id in found]


def _scored_tokens(scores: mx.array, reporting: list[tuple[int, int]]) -> list[SampledToken]:
    packed = np.array(scores)
    found: list[Score | None] = [None] * len(packed)
    rows, num_top = zip(*reporting, strict=True)
    for row, score in zip(rows, unpack(packed[list(rows)], num_top), strict=True):
        found[row] = score
    return [SampledToken(*each) for each in zip(own_token_ids(packed), found, strict=True)]
