"""Where a model's files are: a folder of the user's, the converted demo model, or a repository of the hub.

Called by `mlx_model` before it loads. Says in one sentence what is wrong with a folder; knows nothing of MLX.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

from common.errors import StartupError
from common.settings import DEMO_MODEL, Settings

log = logging.getLogger(__name__)


def find(settings: Settings, hub_patterns: list[str]) -> Path:
    """The local folder of `settings.model`: the demo's, one given by its path, or a hub repository's.

    Args:
        hub_patterns: Which files of a repository are downloaded.

    Raises:
        StartupError: There is no such model, or it cannot be fetched.
    """
    name = settings.model
    if name == DEMO_MODEL:
        from worker.demo_model import ensure_demo_model  # which converts through this module

        return ensure_demo_model(settings.cache_dir)
    folder = Path(name).expanduser()
    if folder.exists():
        return _checked(folder)
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII):
        raise StartupError(f"the model folder {name} does not exist")
    return _checked(_from_hub(name, hub_patterns))


def _checked(folder: Path) -> Path:
    """Make sure that a folder holds an MLX model.

    Raises:
        StartupError: It does not; says what is missing.
    """
    if not folder.is_dir():
        raise StartupError(
            f"{folder} is a file; --model takes a folder with a model in MLX's format, or a repository"
        )
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


def _from_hub(repository: str, patterns: list[str]) -> Path:
    """Download a repository, or take it from the hub's cache.

    Raises:
        StartupError: There is no such repository, it may not be read, or the hub cannot be reached.
    """
    from huggingface_hub import errors, snapshot_download

    log.info("model %s: looking it up on the hub", repository)
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except errors.GatedRepoError:
        raise StartupError(
            f"the hub lets only some accounts read {repository}; log in with `hf auth login`"
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise StartupError(
            f"there is no folder {repository} here and no repository of that name on the hub"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise StartupError(
            f"there is no folder {repository} here, and the hub cannot be reached to download a repository of that name"
        ) from None
    except OSError as error:  # HTTP errors of the hub are OSErrors too, as is a full disk
        raise StartupError(f"{repository} cannot be downloaded from the hub: {one_line(error)}") from None


def one_line(error: BaseException) -> str:
    """An exception as the end of a sentence."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
