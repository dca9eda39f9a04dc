"""Multi-scale retention, chunkwise, in one or both directions."""
