"""Where mlx-pool keeps files of its own on this machine. Used by workers and by what starts a pool."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from common.settings import Settings


def state_folder(settings: Settings) -> Path:
    """The folder of the embedded server's data and of memory claims: as set, else the user's."""
    if settings.state_dir:
        return Path(settings.state_dir).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "mlx-pool"
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "mlx-pool"
