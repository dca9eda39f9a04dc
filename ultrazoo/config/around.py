"""A model section around one block, for what looks at that block alone."""

from __future__ import annotations

from typing import Any

from ultrazoo.config.model import ModelConfig
from ultrazoo.registry import FIELDS
from ultrazoo.spec import BlockSpec


def model_around(spec: BlockSpec, width: int, *, head_width: int = 64, **changes: Any) -> ModelConfig:
    """Return a model section that uses a block: heads that divide the width, a feed-forward of four widths, no dropout.

    Args:
        spec: The block.
        width: D.
        head_width: Channels that a head has at least, where the width allows it.
        changes: Fields of the model section that differ.

    Raises:
        ValidationError: A field is out of range.
    """
    heads = next(count for count in range(max(1, width // head_width), 0, -1) if width % count == 0)
    return ModelConfig.model_validate(
        {
            "hidden_size": width,
            "num_heads": heads,
            "retention_heads": heads,
            "ffn_hidden_size": 4 * width,
            "dropout": 0.0,
            FIELDS[spec.kind]: [spec.name] if spec.kind == "mixer" else spec.name,
            **changes,
        }
    )
