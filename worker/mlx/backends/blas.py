"""OpenBLAS, for MLX's CPU build on Linux: it must be loaded before MLX.

Called when `worker.mlx` is imported, and by `worker.mlx.model` for what to log. Must not import MLX.
"""

from __future__ import annotations

import ctypes
import functools
import sys


@functools.cache
def preload_blas() -> str | None:
    """Load OpenBLAS where MLX's CPU build finds it. Only Linux needs it.

    MLX links the reference BLAS there: 16 times slower in a batch (219 against 13.5 tokens/s, SmolLM2, 2 cores).

    Returns:
        What to install, as a sentence for the log, or None if nothing is missing.
    """
    if sys.platform != "linux":
        return None
    try:
        ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return "libopenblas.so.0 is missing, so MLX on this CPU is slow; install OpenBLAS (Debian: libopenblas0-pthread)"
    return None
