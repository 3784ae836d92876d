"""Where a model's files are: a folder of the user's, the converted demo model, or a repository of the hub.

Called by `mlx_model` before it loads. Says in one sentence why the hub gives nothing; knows nothing of MLX.
"""

from __future__ import annotations

import logging
from pathlib import Path

from common import local_model
from common.errors import StartupError, one_line
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
        from worker.models.demo_model import ensure_demo_model  # which converts through this module

        return ensure_demo_model(settings.cache_dir)
    return local_model.given(name) or local_model.checked(_from_hub(name, hub_patterns))


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
