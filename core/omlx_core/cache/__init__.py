"""The paged two-tier KV cache: blocks, hashes and tiers. Knows bytes, not models."""
