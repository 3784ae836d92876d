"""The prefill budget: what is prefilled between two decode steps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.settings import Settings
from worker.mlx.prefill.budget import (
    MAX_IN_PIECES,
    MAX_PROMPTS,
    MIN_TOKENS,
    TARGET_SECONDS,
    PrefillBudget,
    PrefillPlan,
)

LENGTHS = st.lists(st.integers(1, 5000), max_size=12)


def budget_of(num_tokens: int) -> PrefillBudget:
    budget = PrefillBudget(100_000)
    budget.num_tokens = budget.piece_tokens = num_tokens
    return budget


@pytest.mark.parametrize(
    ("begun", "waiting", "plan"),
    [
        ([], [37] * 16, PrefillPlan([0, 1, 2, 3], 40)),  # complete prompts, as many as there is room for
        (
            [],
            [37, 37, 300, 37],
            PrefillPlan([0, 1], 80),
        ),  # with the long prompt the first two would prefill in pieces
        (
            [],
            [300, 37, 37],
            PrefillPlan([0, 1, 2], 13),
        ),  # short prompts share the pieces of a long one
        ([300], [37, 300, 37], PrefillPlan([0, 2], 13)),  # and overtake another long prompt that waits
        ([300], [160, 150], PrefillPlan([1], 20)),  # if they are at most half as long as the longest
        ([300, 300], [37], PrefillPlan([0], 13)),
        ([], [5000], PrefillPlan([0], 40)),
        ([5000], [], PrefillPlan([], 40)),
        ([], [], PrefillPlan([], 160)),
        ([], [0] * 200, PrefillPlan(list(range(MAX_PROMPTS)), 2)),  # prompts of one token
        ([5000] * MAX_IN_PIECES, [1], PrefillPlan([], 5)),
        ([], [5000, *[1] * 20], PrefillPlan(list(range(MAX_IN_PIECES)), 5)),
    ],
)
def test_plan(begun: list[int], waiting: list[int], plan: PrefillPlan) -> None:
    """With room for 160 tokens, or 40 in pieces: which prompts prefill, and how much of each."""
    budget = budget_of(160)
    budget.piece_tokens = 40
    assert budget.plan(begun, waiting) == plan


@given(begun=LENGTHS.map(lambda lengths: lengths[:MAX_IN_PIECES]), waiting=LENGTHS, num=st.integers(1, 4096))
def test_a_plan_keeps_to_the_budget(begun: list[int], waiting: list[int], num: int) -> None:
    """Whatever waits: the tokens of all prompts together stay within the budget, something is always prefilled, and the first one joins."""
    plan = budget_of(num).plan(begun, waiting)
    num_prompts = len(begun) + len(plan.joining)
    assert plan.num_tokens >= 1
    assert num_prompts >= min(1, len(begun) + len(waiting))
    assert num_prompts <= MAX_PROMPTS
    assert plan.joining == sorted(set(plan.joining))
    assert num_prompts * plan.num_tokens <= max(num, num_prompts)
    if waiting and not begun:
        assert plan.joining[0] == 0


def test_the_budget_adapts_to_durations() -> None:
    """It shrinks after slow prefills and grows again after fast ones, between the minimum and the setting."""
    budget = PrefillBudget(512)
    budget.num_tokens = 512
    budget.observe(512, 4 * TARGET_SECONDS)
    assert budget.num_tokens == 128
    assert budget.piece_tokens == MIN_TOKENS
    budget.observe(128, 1000.0)
    assert budget.num_tokens == MIN_TOKENS
    for _ in range(10):
        budget.observe(budget.num_tokens, 0.01)
    assert budget.num_tokens == 512
    assert PrefillBudget(16).num_tokens == 16


def test_copy_tokens() -> None:
    """The faster prompts prefill, the longer a prefix must be to be worth a copy; slow and small prefills have little influence."""
    budget = PrefillBudget(4096)
    assert budget.copy_tokens == 0
    budget.observe(300, 1.0)
    assert budget.copy_tokens == 1
    budget.observe(2000, 0.05)
    fast = budget.copy_tokens
    assert fast == 160
    budget.observe(1, 1e-9)
    budget.observe(400, 1.0)
    assert 0.9 * fast < budget.copy_tokens <= fast


def test_small_prefills_do_not_shrink_the_budget() -> None:
    """A few tokens take longer per token than many, so their duration does not make the budget smaller."""
    budget = budget_of(200)
    budget.observe(4, 0.2)
    assert budget.num_tokens == 200
    budget.observe(100, 0.2)
    assert budget.num_tokens == 400
    budget.observe(100, 2 * TARGET_SECONDS)
    assert budget.num_tokens == 50


def test_every_piece_of_a_long_prompt_keeps_to_the_time() -> None:
    """On a machine that prefills 100 tokens a second, no piece of a long prompt takes longer than the target, the last one included."""
    budget, left, steps = PrefillBudget(2048), 3000, []
    while left:
        num = min(left, budget.plan([left], []).num_tokens)
        steps.append(num / 100)
        budget.observe(num, num / 100)
        left -= num
    assert max(steps) <= TARGET_SECONDS
    assert sum(steps) == pytest.approx(30)


def test_a_pause_after_a_prefill() -> None:
    """As long as the prefill took, at most 20 ms, and only if few sequences wait and many decode: it delays no burst."""
    budget = PrefillBudget(100_000)
    assert not budget.may_pause(1, 100, since_seconds=0.0)
    budget.observe(45, seconds=0.007)
    assert budget.may_pause(1, 8, since_seconds=0.006)
    assert not budget.may_pause(1, 8, since_seconds=0.008)
    assert not budget.may_pause(1, 7, since_seconds=0.0)
    assert not budget.may_pause(2, 8, since_seconds=0.0)
    budget.observe(45, seconds=5.0)
    assert budget.may_pause(1, 8, since_seconds=0.019)
    assert not budget.may_pause(1, 8, since_seconds=0.021)


@pytest.mark.parametrize("waiting", [[500], [60] * 8])
def test_the_first_prefill_is_short(waiting: list[int]) -> None:
    """At 2 tokens a second, no prefill takes longer than the default stall timeout, the first one neither."""
    budget = PrefillBudget(2048)
    for _ in range(10):
        plan = budget.plan([], waiting)
        num = min(waiting[0], plan.num_tokens) * len(plan.joining)
        assert num / 2 < Settings().stall_seconds
        budget.observe(num, num / 2)


def test_a_fast_first_prefill_lifts_the_budget_at_once() -> None:
    """On a GPU, a prompt of 512 tokens has its second and last prefill right after a short first one."""
    budget = PrefillBudget(2048)
    num = budget.plan([], [512]).num_tokens
    budget.observe(num, 0.01)
    assert budget.plan([512 - num], []).num_tokens == 512
