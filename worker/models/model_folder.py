"""Finds a model's files: a local folder, the converted demo model, or a repository of the Hugging Face hub.

`worker.__main__` calls `find` before the engine loads the model. If the hub cannot provide a model, the error says why in one sentence. Independent of MLX.
"""

from __future__ import annotations

import logging
from pathlib import Path

from common.errors import StartupError, one_line
from common.machine import local_model
from common.settings import DEMO_MODEL, Settings
from worker.models.demo_model import ensure_demo_model

log = logging.getLogger(__name__)

HUB_PATTERNS = (
    "*.json",
    "model*.safetensors",
    "*.py",
    "tokenizer.model",
    "*.tiktoken",
    "tiktoken.model",
    "*.txt",
    "*.jsonl",
    "*.jinja",
)
"""The files of a repository that are downloaded: mlx-lm's `DEFAULT_ALLOW_PATTERNS` (0.32)."""


def find(settings: Settings) -> Path:
    """Return the local folder of `settings.model`, which is the demo model, a path, or a repository of the hub.

    Raises:
        StartupError: There is no such model, or it cannot be downloaded.
    """
    name = settings.model
    if name == DEMO_MODEL:
        return ensure_demo_model(settings.cache_dir)
    return local_model.find_folder(name) or local_model.check_folder(_from_hub(name))


def _from_hub(repository: str) -> Path:
    """Download a repository, or find it in the hub's cache.

    Raises:
        StartupError: The repository does not exist or is not accessible, or the hub cannot be reached.
    """
    from huggingface_hub import errors, snapshot_download

    log.info("model %s: resolving it on the hub", repository)
    try:
        return Path(snapshot_download(repository, allow_patterns=list(HUB_PATTERNS)))
    except errors.GatedRepoError:
        raise StartupError(f"{repository} is a gated repository; log in with `hf auth login`") from None
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
