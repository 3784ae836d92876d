"""See `torch`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")


class DataLoader(Generic[Item]):
    """Batches of one item, in order, in this process."""

    def __init__(self, dataset: Iterable[Item], collate_fn: Callable[[list[Item]], Item], **_: Any) -> None:
        self.dataset = dataset
        self._collate = collate_fn

    def __iter__(self) -> Iterator[Item]:
        return (self._collate([item]) for item in self.dataset)
