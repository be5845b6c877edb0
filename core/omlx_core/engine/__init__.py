"""The engine: one thread that owns MLX, and the requests that it serves."""
