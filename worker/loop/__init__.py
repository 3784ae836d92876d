"""The generation loop and what it depends on. No MLX, no RQ, no Redis."""
