"""Range analysis: which values a graph can take (proven), and which it took on samples (observed)."""
