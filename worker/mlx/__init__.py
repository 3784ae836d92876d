"""Everything that touches MLX and mlx-lm. Importing the package prepares the process for them; a worker
imports it on the generation thread only.

MLX's streams and lazy arrays do not cross threads, so the thread that loads the model is the one that generates.
"""

import os

from worker.mlx.backends.blas import preload_blas

preload_blas()
# On CUDA, cuDNN plans attention anew for each number of prompts and each length: 70 ms on an H200, where MLX's own kernels take
# 15 ms (mlx 0.32, which reads the variable at first use). Figures: bench/RESULTS.md.
os.environ.setdefault("MLX_CUDA_USE_CUDNN_SDPA", "0")
