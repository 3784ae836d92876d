"""A worker's share of the memory, and what MLX is asked to keep to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from common.settings import Settings
from worker.mlx.memory import memory_share
from worker.mlx.memory.memory_share import MemoryShare

GPU_BYTES = 80 * 2**30


class Mlx:
    """The part of `mlx.core` that is used, on a GPU."""

    DeviceType = SimpleNamespace(gpu="gpu")

    def __init__(self, *, is_cuda: bool) -> None:
        self.cuda = SimpleNamespace(is_available=lambda: is_cuda)
        self.limits: list[int] = []
        self.set_memory_limit = self.limits.append

    def default_device(self) -> Any:
        return SimpleNamespace(type="gpu")

    def device_info(self) -> dict[str, int]:
        return {"total_memory": GPU_BYTES}


@pytest.mark.parametrize("is_cuda", [True, False])
def test_freed_memory_that_is_kept_is_within_the_share(
    monkeypatch: pytest.MonkeyPatch, *, is_cuda: bool
) -> None:
    """On CUDA MLX keeps freed memory, so its limit follows the share: another worker's memory is not filled with it."""
    mlx = Mlx(is_cuda=is_cuda)
    monkeypatch.setattr(memory_share, "_mlx", lambda: mlx)
    share = MemoryShare(Settings(model="m"))
    alone = share.limit_bytes()
    assert share.limit_bytes() == alone == 0.75 * GPU_BYTES
    share._registration = SimpleNamespace(share_bytes=lambda: alone // 2)  # type: ignore[assignment]
    assert share.limit_bytes() == alone // 2
    assert mlx.limits == ([alone, alone // 2] if is_cuda else [])
