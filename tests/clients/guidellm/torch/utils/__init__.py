"""See `torch`."""

from __future__ import annotations

from torch.utils import data

__all__ = ["data"]
