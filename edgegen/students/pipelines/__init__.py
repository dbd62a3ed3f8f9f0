"""Pipelines of diffusers, read from their folders as data: one row of `table` a pipeline, one reader a kind of part."""
