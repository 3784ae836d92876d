"""The demo model in float32: the model tests compare tokens of different batches, which float16 rounds differently."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from common.settings import Settings
from worker.mlx import model as mlx_model

# MLX's CUDA back-end computes float32 as TF32 otherwise, and a random model's tokens then depend on the other rows of the batch.
os.environ.setdefault("MLX_ENABLE_TF32", "0")


@pytest.fixture(scope="session")
def demo_folder(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in float32: itself on a CPU, a converted copy on a GPU, where it is float16."""
    import mlx.core as mx

    weights: Any = mx.load(str(demo_folder / "model.safetensors"))
    if all(each.dtype == mx.float32 for each in weights.values()):
        return demo_folder
    folder = tmp_path_factory.mktemp("demo-float32")
    for path in demo_folder.iterdir():
        if path.name != "model.safetensors":
            (folder / path.name).symlink_to(path)
    converted = {name: each.astype(mx.float32) for name, each in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), converted, {"format": "mlx"})
    return folder


@pytest.fixture(scope="session")
def demo(demo_folder: Path) -> mlx_model.LoadedModel:
    """The demo model, loaded on pytest's thread."""
    return mlx_model.load_model(Settings(model=str(demo_folder)))
