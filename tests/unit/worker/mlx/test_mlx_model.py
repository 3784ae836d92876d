"""What a model's config says, its chat template, and the warning without OpenBLAS."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from common.errors import StartupError
from worker.mlx import model as mlx_model


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, ""),
        ({"quantization": {"bits": 4, "group_size": 64}}, "4-bit, group 64"),
        ({"quantization": {"bits": 4, "group_size": 32, "mode": "mxfp4"}}, "4-bit, group 32, mxfp4"),
        (
            {
                "quantization": {
                    "bits": 4,
                    "group_size": 64,
                    "lm_head": {"bits": 8, "group_size": 64},
                    "norm": False,
                }
            },
            "4- and 8-bit, group 64",
        ),
        ({"quantization_config": {"quant_method": "bitnet"}}, "bitnet"),
    ],
)
def test_quantization_in_words(config: dict[str, Any], expected: str) -> None:
    """The model card says in a few words how the weights are packed."""
    assert mlx_model.quantization(config) == expected


@pytest.mark.parametrize(
    ("config", "limit", "expected"),
    [
        ({"max_position_embeddings": 8192}, None, 8192),
        ({"n_positions": 1024}, 512, 1024),
        ({"text_config": {"max_position_embeddings": 131072}, "max_position_embeddings": 77}, None, 131072),
        ({}, 2048, 2048),
        ({}, 10**30, 32768),
        ({"max_position_embeddings": None}, None, 32768),
    ],
)
def test_context_length(config: dict[str, Any], limit: int | None, expected: int) -> None:
    """The config's limit under any of its names, else the tokenizer's, else a common one."""
    assert mlx_model.context_length(config, limit) == expected


def test_chat_template_is_text_or_a_file(tmp_path: Path) -> None:
    """`--chat-template` takes Jinja itself or the name of a file with it."""
    path = tmp_path / "template.jinja"
    path.write_text("{{ messages }}")
    assert mlx_model._chat_template(str(path)) == "{{ messages }}"
    assert mlx_model._chat_template("{{ 1 }}") == "{{ 1 }}"
    with pytest.raises(StartupError, match="neither a Jinja template nor a file"):
        mlx_model._chat_template(str(tmp_path / "missing.jinja"))


def test_missing_blas_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without OpenBLAS a Linux worker runs, and says what to install; a Mac needs none."""

    def fail(*_args: object, **_options: object) -> None:
        raise OSError

    monkeypatch.setattr("ctypes.CDLL", fail)
    monkeypatch.setattr(sys, "platform", "linux")
    assert "libopenblas0-pthread" in (mlx_model.preload_blas.__wrapped__() or "")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert mlx_model.preload_blas.__wrapped__() is None
