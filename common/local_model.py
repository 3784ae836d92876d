"""A model's folder on this machine: which names mean one, and in one sentence what is wrong with it.

Used by workers, and by `make up` before it starts any. Knows nothing of MLX or of hubs.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from common.errors import StartupError, one_line

_EXPECTED = "a folder with a model in MLX's format, a repository of the hub, or demo"


def given(model: str) -> Path | None:
    """The folder that `model` names; None where it can only be a hub's repository.

    Raises:
        StartupError: It names a folder that is not there, or that holds no model.
    """
    folder = Path(model).expanduser()
    if folder.exists():
        return checked(folder)
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model, re.ASCII):
        raise StartupError(f"the model folder {model} does not exist; a model is {_EXPECTED}")
    return None


def checked(folder: Path) -> Path:
    """Make sure that a folder holds an MLX model.

    Raises:
        StartupError: It does not; says what is missing.
    """
    if not folder.is_dir():
        raise StartupError(f"{folder} is a file; a model is {_EXPECTED}")
    config = folder / "config.json"
    try:
        is_model = "model_type" in json.loads(config.read_text())
    except FileNotFoundError:
        raise StartupError(f"{folder} holds no model: there is no config.json in it") from None
    except (OSError, ValueError) as error:
        raise StartupError(f"{config} cannot be read: {one_line(error)}") from None
    if not is_model:
        raise StartupError(f"{config} names no model_type, so this is no model that mlx-lm can load")
    if not any(folder.glob("model*.safetensors")):
        raise StartupError(f"{folder} holds no weights: there is no model*.safetensors in it")
    return folder
