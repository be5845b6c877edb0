"""How a model's layer caches become block payloads, and back."""
