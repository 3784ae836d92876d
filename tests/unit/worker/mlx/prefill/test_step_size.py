"""The prefill step of a GPU: as large as it pays, within time and memory."""

from __future__ import annotations

import pytest

from worker.mlx.prefill.budget import INITIAL_TOKENS, PIECE_SECONDS, PrefillBudget
from worker.mlx.prefill.step_size import DEFAULT_TOKENS, Measurement, StepSize, choose, measured

GB = 2**30


class Device:
    """A GPU that needs some time for each step and for each token, and some memory for each token."""

    def __init__(self, step_seconds: float, tokens_per_second: float, bytes_per_token: int = 800_000) -> None:
        self.step_seconds = step_seconds
        self.tokens_per_second = tokens_per_second
        self.bytes_per_token = bytes_per_token
        self.measured: list[int] = []

    def measure(self, num_tokens: int) -> Measurement:
        self.measured.append(num_tokens)
        seconds = self.step_seconds + num_tokens / self.tokens_per_second
        return Measurement(seconds, self.bytes_per_token * num_tokens)


def test_a_fast_gpu() -> None:
    """Steps double until twice as many tokens bring less than a twentieth."""
    device = Device(0.005, 250_000)
    size = choose(device.measure, 100_000, 100 * GB)
    assert size == StepSize(16_384, 16_384, 800_000)
    assert device.measured == [128 * 2**i for i in range(9)]


def test_a_gpu_that_is_busy_with_few_tokens() -> None:
    """The default then, and nothing beyond the next size is measured."""
    device = Device(0.0, 40_000)
    assert choose(device.measure, 100_000, 100 * GB).num_tokens == DEFAULT_TOKENS
    assert max(device.measured) == 2 * DEFAULT_TOKENS


def test_a_slow_gpu() -> None:
    """Nothing is measured that takes longer than a piece may; the first prompts begin with what keeps to that time."""
    device = Device(0.01, 2000)
    size = choose(device.measure, 100_000, 100 * GB)
    assert (size.num_tokens, size.first_tokens) == (DEFAULT_TOKENS, 256)
    assert device.measured == [128, 256]
    crawling = Device(0.0, 20)
    assert choose(crawling.measure, 100_000, 100 * GB).first_tokens == INITIAL_TOKENS
    assert crawling.measured == [128]


def test_memory_bounds_the_step() -> None:
    """What takes more is not used, and nothing beyond it measured; neither after the limit has become smaller."""
    device = Device(0.005, 250_000)
    size = choose(device.measure, 100_000, 2 * GB)
    assert max(device.measured) // 2 * device.bytes_per_token <= 2 * GB
    assert size.within(2 * GB) * device.bytes_per_token <= 2 * GB
    assert size.within(GB) == GB // device.bytes_per_token
    assert size.within(0) == 512, "the smallest step"


def test_a_short_context_bounds_the_step() -> None:
    """No prompt is longer than the model's context."""
    device = Device(0.005, 250_000)
    choose(device.measure, 1000, 100 * GB)
    assert device.measured == [128, 256, 512]
    choose(device.measure, 100, 100 * GB)
    assert device.measured[3:] == [100]


def test_a_failure_leaves_the_default(caplog: pytest.LogCaptureFixture) -> None:
    """A worker starts even if a dummy prompt cannot be prefilled."""

    def fail(_num_tokens: int, _step_tokens: int) -> None:
        raise RuntimeError("no such kernel")

    assert measured(fail, 1000, GB) == StepSize()
    assert "no such kernel" in caplog.text


def test_the_budget_begins_with_what_was_measured() -> None:
    """On a GPU that was measured, the first prompt is prefilled at full speed; a smaller limit applies at once."""
    budget = PrefillBudget(4096, 4096)
    assert budget.plan([], [4000]).num_tokens == 4096
    budget.set_max_tokens(512)
    assert budget.plan([], [4000]).num_tokens == 512
    budget.observe(512, PIECE_SECONDS / 100)
    assert budget.plan([], [4000]).num_tokens == 512
    budget.set_max_tokens(4096)
    budget.observe(512, PIECE_SECONDS / 100)
    assert budget.plan([], [4000]).num_tokens == 1024
