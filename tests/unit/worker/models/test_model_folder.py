"""Finding a model's files: what is wrong with a folder, a file or a repository is reported in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from common.errors import StartupError
from common.settings import Settings
from worker.models import model_folder


def _make_folder(tmp_path: Path, config: str | None, *, weights: bool) -> Path:
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
    """The error names what is missing in a folder, without loading MLX."""
    folder = _make_folder(tmp_path, config, weights=weights)
    with pytest.raises(StartupError, match=sentence):
        model_folder.find(Settings(model=str(folder)))


def test_no_such_folder() -> None:
    """A path that does not exist is not looked up on the hub."""
    with pytest.raises(StartupError, match="the model folder /no/such/model does not exist"):
        model_folder.find(Settings(model="/no/such/model"))


def test_a_file_is_no_model(tmp_path: Path) -> None:
    """A file, such as a GGUF file, is refused with an explanation."""
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
def test_hub_errors(monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str) -> None:
    """Each failure of the hub is reported in one sentence, without a traceback."""

    def fail(*_args: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(StartupError, match=sentence):
        model_folder.find(Settings(model="org/no-such-model"))
