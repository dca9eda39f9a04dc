"""Numbers of rows that change from step to step are rounded up to tiles, where rows more cost nothing but time."""

ROW_TILE = 32
"""oneDNN, which multiplies bfloat16 on CPUs, makes and keeps code for every shape that it meets, about 0.7 MB each and
0.5 ms: rows counted by chance (masked tokens, the tokens of an expert) would fill the memory of a long run."""
