"""Sampling defaults in a model's `generation_config.json`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from common.models import sampling_defaults


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [1, 2]},
            {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
        ),
        ({"min_p": 0.05, "repetition_penalty": 1.05}, {"min_p": 0.05, "repetition_penalty": 1.05}),
        ({"temperature": 1, "top_k": -1}, {"temperature": 1, "top_k": 0}),
        ({"do_sample": False, "max_new_tokens": 5, "temperature": None}, {}),
    ],
)
def test_a_models_file(tmp_path: Path, config: dict[str, Any], values: dict[str, float]) -> None:
    """Of transformers' many fields those that are sampling parameters here."""
    (tmp_path / sampling_defaults.FILE).write_text(json.dumps(config))
    assert sampling_defaults.read(tmp_path) == values
    assert sampling_defaults.from_text(sampling_defaults.to_text(values)) == values
    assert type(sampling_defaults.read(tmp_path).get("top_k", 0)) is int


@pytest.mark.parametrize(
    "config", [{"temperature": 3}, {"temperature": "hot"}, {"top_p": 0}, {"top_k": 1.5}, {"min_p": True}]
)
def test_values_out_of_range(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, config: dict[str, Any]
) -> None:
    """What a request could not ask for is logged and left out."""
    (tmp_path / sampling_defaults.FILE).write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING):
        assert sampling_defaults.read(tmp_path) == {}
    assert next(iter(config)) in caplog.text


@pytest.mark.parametrize("content", [None, b"", b"[1]", b"\xff", b"{", b"[" * 100_000])
def test_no_file_or_a_broken_one(tmp_path: Path, content: bytes | None) -> None:
    """The model has no defaults; that keeps no worker from starting."""
    if content is not None:
        (tmp_path / sampling_defaults.FILE).write_bytes(content)
    assert sampling_defaults.read(tmp_path) == {}
