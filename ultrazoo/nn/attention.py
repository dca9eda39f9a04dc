"""What the attention blocks share: their options, their projections, and the mask of packed documents."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ultrazoo.nn.bitlinear import make_linear
from ultrazoo.nn.block_config import BlockConfig
from ultrazoo.nn.rotary import rotate
from ultrazoo.nn.saturate import saturate
from ultrazoo.nn.segments import checked, positions


class AttentionConfig(BlockConfig):
    """Options that every attention block has."""

    hidden_size: int = Field(gt=0, description="Model width D.")
    num_heads: int = Field(gt=0, description="Attention heads H; a divisor of hidden_size.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Probability of dropping an attention weight.")
    position_embedding: Literal["none", "learned", "sinusoidal", "rope"] = Field(
        default="rope", description="Queries and keys are rotated when this is rope."
    )
    use_bitnet: bool = Field(default=False, description="Ternary projections (BitNet b1.58).")
    initializer_range: float = Field(default=0.02, gt=0, description="Standard deviation of the initial projections.")
    attention_bias: bool = Field(default=True, description="Biases in the q, k, v and output projections, as in BERT.")

    @property
    def head_width(self) -> int:
        """K, the width of one head."""
        return self.hidden_size // self.num_heads

    @property
    def pairs_channels(self) -> bool:
        """Whether positions act on pairs of channels, so that K must be even."""
        return self.position_embedding == "rope"

    @model_validator(mode="after")
    def _check_heads(self) -> AttentionConfig:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"got hidden_size {self.hidden_size} and num_heads {self.num_heads}, expected a multiple; "
                f"nearest hidden_size: {max(1, round(self.hidden_size / self.num_heads)) * self.num_heads}"
            )
        if self.pairs_channels and self.head_width % 2:
            raise ValueError(
                f"got hidden_size {self.hidden_size} / num_heads {self.num_heads} = {self.head_width} channels a head, "
                "expected an even number; rotary positions and HoPE act on pairs of channels"
            )
        return self


class AttentionProjections(nn.Module):
    """q, k, v = x W + b by head, rotated when positions are rotary; y = merge(o) W_o + b_o.

    Args:
        config: Widths, biases and positions.
        rotary: Rotate queries and keys.
        qk_norms: Applied to the queries and to the keys of each head, before they are rotated.
    """

    def __init__(
        self, config: AttentionConfig, *, rotary: bool, qk_norms: tuple[nn.Module, nn.Module] | None = None
    ) -> None:
        super().__init__()
        width, bias, bitnet = config.hidden_size, config.attention_bias, config.use_bitnet
        self.num_heads = config.num_heads
        self.rotary = rotary
        self.qk_norms = None if qk_norms is None else nn.ModuleList(qk_norms)
        self.qkv = make_linear(width, 3 * width, bias=bias, bitnet=bitnet)
        self.output = make_linear(width, width, bias=bias, bitnet=bitnet)
        for layer in (self.qkv, self.output):
            nn.init.normal_(layer.weight, std=config.initializer_range)
            if bias:
                nn.init.zeros_(layer.bias)

    def split(self, x: Tensor, segments: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Project x (B, L, D) to queries, keys and values, each (B, L, H, K)."""
        qkv = self.qkv(x).unflatten(2, (3 * self.num_heads, -1))  # (B, L, 3H, K)
        qk, v = qkv.split((2 * self.num_heads, self.num_heads), dim=2)
        if self.qk_norms is not None:
            qk = torch.cat([norm(part) for norm, part in zip(self.qk_norms, qk.chunk(2, dim=2), strict=True)], dim=2)
        if self.rotary:
            qk = rotate(qk, positions(segments, x.shape[1], x.device))
        q, k = qk.chunk(2, dim=2)
        return q, k, v

    def merge(self, o: Tensor) -> Tensor:
        """Project o (B, L, H, K) to (B, L, D)."""
        return saturate(self.output(saturate(o.flatten(2))))


def attention_mask(segments: Tensor | None) -> Tensor | None:
    """Tell for each pair of positions whether both are of one document; padding sees padding, so no row is empty.

    Args:
        segments: (B, L) int64, or None.

    Returns:
        (B, 1, L, L) bool, or None for full rows, which need none.
    """
    if segments is None:
        return None
    segments = checked(segments)
    return segments[:, None, :, None].eq(segments[:, None, None, :])
