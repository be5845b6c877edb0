"""Models: loading, fingerprint, prompts, and a small real one for trying things out."""
