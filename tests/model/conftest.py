"""The real small model of this layer, loaded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from common.settings import Settings
from worker.mlx import model as mlx_model

# MLX's CUDA back-end shortens float32 otherwise, and the tokens of a random model then depend on the rows beside it.
os.environ.setdefault("MLX_ENABLE_TF32", "0")


@pytest.fixture(scope="session")
def demo(demo_folder: Path) -> mlx_model.LoadedModel:
    """The demo model, loaded on pytest's thread."""
    return mlx_model.load_model(Settings(model=str(demo_folder)))
