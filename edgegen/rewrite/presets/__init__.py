"""Pipelines as data: `canonical` for every target, and one module a backend for what its runtime wants."""
