"""``omlx-plugins bench``: what the cache is worth for a model of one's own, on one's own machine."""
