"""The prefill budget: what is read between two decode steps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.prefill import LEAST_TOKENS, MOST_PROMPTS, TARGET_SECONDS, PrefillBudget, PrefillPlan

LENGTHS = st.lists(st.integers(1, 5000), max_size=12)


def budget_of(num_tokens: int) -> PrefillBudget:
    budget = PrefillBudget(100_000)
    budget.num_tokens = num_tokens
    return budget


@pytest.mark.parametrize(
    ("begun", "waiting", "plan"),
    [
        ([], [37] * 16, PrefillPlan(4, 40)),  # whole ones, as many as there is room for
        ([], [37, 37, 300, 37], PrefillPlan(2, 80)),  # a long one would have the first two read in pieces
        ([], [300, 37, 37], PrefillPlan(3, 53)),  # short ones are read beside a long one
        ([300], [37, 300, 37], PrefillPlan(2, 80)),  # but not a second long one
        ([300, 300], [37], PrefillPlan(3, 53)),
        ([], [5000], PrefillPlan(1, 160)),
        ([5000], [], PrefillPlan(1, 160)),
        ([], [], PrefillPlan(1, 160)),
        ([], [0] * 20, PrefillPlan(MOST_PROMPTS, 20)),  # prompts of one token
    ],
)
def test_plan(begun: list[int], waiting: list[int], plan: PrefillPlan) -> None:
    """With room for 160 tokens: which prompts are read, and in what pieces."""
    assert budget_of(160).plan(begun, waiting) == plan


@given(begun=LENGTHS.map(lambda lengths: lengths[:MOST_PROMPTS]), waiting=LENGTHS, num=st.integers(1, 4096))
def test_a_plan_keeps_to_the_budget(begun: list[int], waiting: list[int], num: int) -> None:
    """Whatever waits: the tokens of all prompts together stay within it, and some are always read."""
    plan = budget_of(num).plan(begun, waiting)
    assert plan.num_tokens >= 1
    assert plan.num_prompts >= max(1, len(begun))
    assert plan.num_prompts <= max(1, len(begun) + len(waiting))
    assert plan.num_prompts * plan.num_tokens <= max(num, plan.num_prompts)


def test_learning() -> None:
    """Steps that take long get smaller, fast ones grow again, within what the setting and sense say."""
    budget = PrefillBudget(512)
    budget.num_tokens = 512
    budget.took(512, 4 * TARGET_SECONDS)
    assert budget.num_tokens == 128
    budget.took(128, 1000.0)
    assert budget.num_tokens == LEAST_TOKENS
    for _ in range(10):
        budget.took(budget.num_tokens, 0.01)
    assert budget.num_tokens == 512
    assert PrefillBudget(16).num_tokens == 16


def test_few_tokens_say_little() -> None:
    """A short prompt costs more for each token than many do: it makes the budget no smaller."""
    budget = budget_of(200)
    budget.took(4, 0.2)
    assert budget.num_tokens == 200
    budget.took(100, 0.2)
    assert budget.num_tokens == 400
    budget.took(100, 2 * TARGET_SECONDS)
    assert budget.num_tokens == 50
