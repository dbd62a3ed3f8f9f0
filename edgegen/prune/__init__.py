"""Structured pruning: whole channels, heads, feed-forward units and blocks come out, before capture."""
