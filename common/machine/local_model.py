"""A model's folder on this machine: which names mean a folder, and what is wrong with it, in one sentence.

Used by workers, and by `make up` before it starts any. Independent of MLX and of model hubs.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from common.errors import StartupError, one_line

_EXPECTED = "a folder with a model in MLX's format, a repository of the hub, or demo"


def find_folder(model: str) -> Path | None:
    """The folder that `model` names; None if it can only be a repository of the hub.

    Raises:
        StartupError: It names a folder that does not exist, or that holds no model.
    """
    folder = Path(model).expanduser()
    if folder.exists():
        return check_folder(folder)
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model, re.ASCII):
        raise StartupError(f"the model folder {model} does not exist; a model is {_EXPECTED}")
    return None


def check_folder(folder: Path) -> Path:
    """Return the folder if it holds an MLX model.

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
        raise StartupError(f"{config} has no model_type, so mlx-lm cannot load this model")
    if not any(folder.glob("model*.safetensors")):
        raise StartupError(f"{folder} holds no weights: there is no model*.safetensors in it")
    return folder
