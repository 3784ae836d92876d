"""The real small model of this layer: the demo model, from the user's cache, or fetched and converted now."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.settings import Settings
from worker import demo_model, mlx_model


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The demo model's folder."""
    return demo_model.ensure_demo_model(Settings.load().cache_dir)


@pytest.fixture(scope="session")
def demo(demo_folder: Path) -> mlx_model.LoadedModel:
    """The demo model, loaded on pytest's thread."""
    return mlx_model.load_model(Settings(model=str(demo_folder)))
