"""The base of every block's options."""

from __future__ import annotations

from ultrazoo.options import Options


class BlockConfig(Options):
    """Frozen options of one block; unknown keys and numbers that no block can use are errors.

    A field that bears the name of a field of the model section takes the model's value. Every other field is an option
    of the block, with its default here, set in YAML under ``model.block_options.<block>``.
    """
