"""Synthetic tasks with a known optimum, and the table of mixers that learn them at equal parameters."""
