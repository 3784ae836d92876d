"""Everything that touches MLX and mlx-lm. Importing the package prepares the process for them; a worker
imports it on the generation thread only.

MLX's streams and lazy arrays do not cross threads, so the thread that loads the model is the one that generates.
"""

import os

from worker.mlx.backends.blas import preload_blas

preload_blas()
# How many plans of cuDNN MLX keeps (mlx 0.32, which reads the variable at first use); see `worker.mlx.backends.prompt_attention`.
os.environ.setdefault("MLX_CUDA_SDPA_CACHE_SIZE", "2048")
