"""This worker's share of the machine's memory, next to the other workers on the machine.

Created by `worker.mlx.engine` before it loads a model; sets MLX's memory limit and wired limit. `python -m
worker.mlx.memory.memory_share` prints the machine's memory for `make up`, which must not import MLX. The arithmetic is in `common.machine.memory_claims`.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from common.errors import StartupError
from common.machine import memory_claims
from common.machine.folders import state_folder
from common.machine.memory_claims import GB, Claim, Machine
from common.settings import Settings

log = logging.getLogger(__name__)

_MACHINE_SHARE = 0.75


class MemoryShare:
    """See the module."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._machine = machine()
        self._registration: memory_claims.Registration | None = None
        self._cuda_limit_bytes: int | None = None
        if settings.memory_limit_gb is not None:
            _mlx().set_memory_limit(int(settings.memory_limit_gb * GB))
        if settings.wired_limit and (recommended := _recommended_bytes()):
            _mlx().set_wired_limit(recommended)  # until the process ends

    def claim(self, model_folder: Path) -> None:
        """Register what the model in this folder needs; call it before the model is loaded.

        Raises:
            StartupError: It does not fit next to the workers that run on this machine.
        """
        limit_gb = self._settings.memory_limit_gb
        claim = Claim(
            pid=os.getpid(),
            model=self._settings.model,
            device=self._machine.device,
            weight_bytes=memory_claims.weight_bytes(model_folder),
            limit_bytes=None if limit_gb is None else int(limit_gb * GB),
        )
        folder = memory_claims.folder(state_folder(self._settings))
        try:
            self._registration = memory_claims.register(claim, self._machine, folder)
        except OSError as error:
            log.warning("other workers on this machine cannot see how much memory this one takes: %s", error)

    def limit_bytes(self) -> int:
        """The memory that this worker may use now, its model's weights included. Cheap enough to call often."""
        if self._registration is not None:
            limit_bytes = self._registration.share_bytes()
        elif self._settings.memory_limit_gb is not None:
            limit_bytes = int(self._settings.memory_limit_gb * GB)
        else:
            limit_bytes = self._machine.limit_bytes
        if limit_bytes != self._cuda_limit_bytes and _mlx().cuda.is_available():
            # Freed memory is kept there. Above its limit MLX frees that before it takes more; by default the limit is nearly all of the device.
            self._cuda_limit_bytes = limit_bytes
            _mlx().set_memory_limit(max(0, limit_bytes))
        return limit_bytes


def machine() -> Machine:
    """The device that MLX computes on, and how much of its memory workers may use.

    Raises:
        StartupError: MLX cannot be imported.
    """
    return Machine(_device_name(), int(_machine_limit_bytes()))


def _device_name() -> str:
    """Which memory MLX computes in: workers with the same name share it."""
    if not _device_info():
        return "cpu"
    # MLX uses the first GPU that CUDA shows it.
    return "gpu " + os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]


def _machine_limit_bytes() -> float:
    """What MLX recommends for a Mac's GPU; elsewhere a share of the device's memory."""
    if recommended := _recommended_bytes():
        return recommended
    about = _device_info()
    return _MACHINE_SHARE * (about.get("memory_size") or about.get("total_memory") or _main_memory_bytes())


def _recommended_bytes() -> int:
    """What MLX recommends for a Mac's GPU; 0 elsewhere."""
    return int(_device_info().get("max_recommended_working_set_size") or 0)


def _device_info() -> dict[str, Any]:
    """Properties of the GPU, with keys that differ between Metal and CUDA (MLX 0.32); empty for a CPU."""
    mx = _mlx()
    if mx.default_device().type != mx.DeviceType.gpu:
        return {}
    return dict(mx.device_info())


def _main_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _mlx() -> ModuleType:
    """`mlx.core`; `make up` runs this file before anything has shown that it can be imported."""
    try:
        import mlx.core as mx
    except ImportError as error:
        raise StartupError(f"MLX cannot be imported ({error}); `make install` installs it") from None
    return mx


def main() -> int:
    """Print the machine as a line of JSON; returns the exit status."""
    try:
        line = msgspec.json.encode(machine()).decode()
    except StartupError as error:
        sys.stderr.write(f"mlx-pool: {error}\n")
        return 1
    sys.stdout.write(line + "\n")
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # as in worker.__main__: MLX's threads may abort a regular exit
