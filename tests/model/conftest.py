"""The real small model of this layer, loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.settings import Settings
from worker import mlx_model


@pytest.fixture(scope="session")
def demo(demo_folder: Path) -> mlx_model.LoadedModel:
    """The demo model, loaded on pytest's thread."""
    return mlx_model.load_model(Settings(model=str(demo_folder)))
