"""Everything that touches MLX and mlx-lm. Importing the package prepares the process for them; only the generation thread does.

MLX's streams and lazy arrays do not cross threads: the thread that loads the model is the one that generates.
"""

import os

from worker.mlx.backends.blas import preload_blas

preload_blas()
# With CUDA, cuDNN plans attention anew for each number of prompts and each length: 70 ms on an H200, where MLX's own takes 15
# (0.32; read at its first use). Figures: bench/RESULTS.md.
os.environ.setdefault("MLX_CUDA_USE_CUDNN_SDPA", "0")
