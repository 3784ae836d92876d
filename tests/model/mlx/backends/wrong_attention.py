"""An `AppendAttention` whose self-test fails."""

from __future__ import annotations

import mlx.core as mx

from worker.mlx.backends.append_attention import Appended, FunctionalAppendAttention, Kind, Step, self_test

KIND = Kind(mx.float16, 64, 2, 3)


class WrongAttention(FunctionalAppendAttention):
    """Forgets to write the new keys, or raises."""

    def __init__(self, *, raises: bool) -> None:
        self._raises = raises
        self._passed: bool | None = None

    def supports(self, queries: mx.array, keys: mx.array, values: mx.array) -> bool:
        if self._passed is None:
            self._passed = self_test(self, KIND)
        return self._passed and super().supports(queries, keys, values)

    def __call__(self, step: Step) -> Appended:
        if self._raises:
            raise RuntimeError("no such architecture")
        return Appended(super().__call__(step).output, step.keys, step.values)
