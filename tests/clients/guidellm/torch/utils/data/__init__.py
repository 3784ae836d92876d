"""See `torch`."""

from __future__ import annotations

from torch.utils.data.dataloader import DataLoader
from torch.utils.data.dataset import IterableDataset

__all__ = ["DataLoader", "IterableDataset", "get_worker_info"]


def get_worker_info() -> None:
    """There are no worker processes."""
