"""Dropout by a counter-based generator: the backward draws the same mask again."""
