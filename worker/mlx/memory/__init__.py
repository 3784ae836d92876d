"""How much memory a worker may use, and what of it the caches of sequences need."""
