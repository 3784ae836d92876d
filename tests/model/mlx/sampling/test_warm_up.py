"""The device sampler's warm-up: each operation that some request may need is used before the first request."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import pytest

from worker.mlx.sampling import warm_up
from worker.mlx.sampling.choose import PlanKey, make_choose
from worker.mlx.sampling.device_sampler import DeviceSampler


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[PlanKey]:
    """The keys of the functions that were used."""
    keys: list[PlanKey] = []

    def make(key: PlanKey) -> Callable[..., Any]:
        keys.append(key)
        return make_choose(key)

    monkeypatch.setattr(warm_up, "make_choose", make)
    return keys


def test_each_operation_is_used(used: list[PlanKey], caplog: pytest.LogCaptureFixture) -> None:
    """Alone and with others: with logits of the model's dtype and of float32, for some rows and for all."""
    with caplog.at_level(logging.INFO):
        DeviceSampler(300, eos_token_ids=[1], compile_after=None).warm_up(mx.float16)
    assert "warmed up the sampler" in caplog.text
    for name in (
        "window_tokens",
        "num_biases",
        "has_min_tokens",
        "is_penalized",
        "is_drawn",
        "has_limits",
        "has_xtc",
    ):
        assert any(getattr(key, name) for key in used), name
    is_float32 = {bool(key.is_penalized or key.num_masks or key.num_biases) for key in used if key.num_top}
    assert is_float32 == {False, True}
    assert {0 < key.num_filtered < key.num_rows for key in used if key.num_filtered} == {False, True}
    assert {0 < key.num_masks < key.num_rows for key in used if key.num_masks} == {False, True}
    assert {(key.is_penalized, bool(key.num_masks)) for key in used} == {
        (False, False),
        (False, True),
        (True, False),
        (True, True),
    }


def test_functions_are_compiled_too(used: list[PlanKey], monkeypatch: pytest.MonkeyPatch) -> None:
    """If the sampler compiles in service, the functions of common kinds are also used as they are compiled."""
    compiled: list[Any] = []
    monkeypatch.setattr(mx, "compile", lambda function: compiled.append(function) or function)
    DeviceSampler(300).warm_up(mx.float32)
    assert len(used) > len(compiled) == len(warm_up._COMMON_KINDS)


def test_a_failure_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The worker starts anyway."""

    def fail(_key: PlanKey) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(warm_up, "make_choose", fail)
    DeviceSampler(300, compile_after=None).warm_up(mx.float32)
    assert "no such kernel" in caplog.text


def test_what_is_compiled_if_the_warm_up_decides() -> None:
    """Functions with the structure of one that was compiled before, of any size; no others, and none before the warm-up."""
    sampler = DeviceSampler(300, compile_after=0, compiles_new=False)
    drawn = PlanKey(7, is_drawn=True)
    before = sampler.function(drawn)
    sampler.warm_up(mx.float32)
    assert type(before) is partial
    assert type(sampler.function(PlanKey(9, is_drawn=True))) is not partial
    assert (
        type(sampler.function(PlanKey(9, is_drawn=True, num_filtered=9, has_limits=True, num_top=5)))
        is partial
    )
    assert type(DeviceSampler(300, compile_after=0).function(drawn)) is not partial


def test_structures() -> None:
    """Sizes do not count, except whether some or all of the rows have filters or masks."""
    key = PlanKey(8, window_tokens=64, num_biases=16, num_filtered=4, num_masks=2, num_top=5)
    assert (
        key.structure()
        == PlanKey(32, window_tokens=8, num_biases=8, num_filtered=16, num_masks=8, num_top=5).structure()
    )
    for other in (
        key._replace(num_filtered=8),
        key._replace(num_filtered=0),
        key._replace(num_masks=8),
        key._replace(num_masks=0),
        key._replace(num_biases=0),
        key._replace(window_tokens=0),
        key._replace(num_top=2),
        key._replace(is_drawn=True),
    ):
        assert other.structure() != key.structure()
