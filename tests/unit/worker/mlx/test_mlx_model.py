"""What is read from a model's config and folder, before MLX is needed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from common.errors import StartupError
from common.settings import Settings
from worker.mlx import model as mlx_model
from worker.models import model_folder


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


def _folder(tmp_path: Path, config: str | None, *, weights: bool) -> Path:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    if weights:
        (tmp_path / "model.safetensors").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("config", "weights", "sentence"),
    [
        (None, True, "there is no config.json in it"),
        ("{", True, "cannot be read: JSONDecodeError"),
        ("{}", True, "has no model_type"),
        (json.dumps({"model_type": "llama"}), False, "holds no weights"),
    ],
)
def test_folder_without_a_model(tmp_path: Path, config: str | None, weights: bool, sentence: str) -> None:
    """What is missing in a folder is said before MLX is loaded."""
    folder = _folder(tmp_path, config, weights=weights)
    with pytest.raises(StartupError, match=sentence):
        model_folder.find(Settings(model=str(folder)))


def test_no_such_folder() -> None:
    """A path that does not exist is not looked for on a hub."""
    with pytest.raises(StartupError, match="the model folder /no/such/model does not exist"):
        model_folder.find(Settings(model="/no/such/model"))


def test_a_file_is_no_model(tmp_path: Path) -> None:
    """A GGUF file, say, is refused in words."""
    path = tmp_path / "model.gguf"
    path.touch()
    with pytest.raises(StartupError, match="is a file"):
        model_folder.find(Settings(model=str(path)))


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (errors.LocalEntryNotFoundError("no network"), "the hub cannot be reached"),
        (errors.HFValidationError("bad"), "no repository of that name"),
        (OSError(28, "No space left on device"), "cannot be downloaded from the hub: OSError.*No space left"),
    ],
)
def test_hub_that_does_not_give_it(monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str) -> None:
    """Each way in which a hub fails is a sentence, never a traceback."""

    def fail(*_args: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(StartupError, match=sentence):
        model_folder.find(Settings(model="org/no-such-model"))


def test_chat_template_is_text_or_a_file(tmp_path: Path) -> None:
    """`--chat-template` takes Jinja itself or the name of a file with it."""
    path = tmp_path / "template.jinja"
    path.write_text("{{ messages }}")
    assert mlx_model._chat_template(str(path)) == "{{ messages }}"
    assert mlx_model._chat_template("{{ 1 }}") == "{{ 1 }}"
    with pytest.raises(StartupError, match="neither a Jinja template nor a file"):
        mlx_model._chat_template(str(tmp_path / "missing.jinja"))


def test_missing_blas_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without OpenBLAS a Linux worker runs, and says what to install; a Mac needs none."""

    def fail(*_args: object, **_options: object) -> None:
        raise OSError

    monkeypatch.setattr("ctypes.CDLL", fail)
    monkeypatch.setattr(sys, "platform", "linux")
    assert "libopenblas0-pthread" in (mlx_model.preload_blas.__wrapped__() or "")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert mlx_model.preload_blas.__wrapped__() is None
