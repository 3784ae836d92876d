"""What one MLX back-end needs and others do not."""
