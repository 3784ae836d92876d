"""All of MLX: the engine, its batch, its caches and its memory."""
