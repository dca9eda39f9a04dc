"""The base of every block's options."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class BlockConfig(BaseModel):
    """Frozen options of one block; unknown keys are errors.

    A field that bears the name of a field of the model section takes the model's value. Every other field is an option
    of the block, with its default here, set in YAML under ``model.block_options.<block>``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
