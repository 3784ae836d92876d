"""See `torch`."""

from __future__ import annotations

from typing import Generic, TypeVar

Item = TypeVar("Item")


class IterableDataset(Generic[Item]):
    """A base class with nothing in it."""
