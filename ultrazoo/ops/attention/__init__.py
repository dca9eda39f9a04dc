"""Softmax and sigmoid attention within documents, with dropout, a tile of scores at a time."""
