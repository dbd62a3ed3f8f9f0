"""Graph rewrites: passes over the ATen graph, one a file, run in pipelines whose order is proven first."""
