"""The dense feed-forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ultrazoo.nn.bitlinear import make_linear
from ultrazoo.nn.block_config import BlockConfig
from ultrazoo.spec import BlockSpec

Activation = Literal["silu", "gelu"]
ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}
"""gelu is x Phi(x) with the exact erf, as in BERT."""


class MLPConfig(BlockConfig):
    """Options of the dense feed-forward, all shared with the model section."""

    hidden_size: int = Field(gt=0, description="Model width D.")
    ffn_hidden_size: int = Field(gt=0, description="Inner width F.")
    ffn_activation: Activation = Field(default="gelu", description="Activation between the two projections.")
    use_bitnet: bool = Field(default=False, description="Both projections are BitLinear (b1.58).")
    initializer_range: float = Field(default=0.02, gt=0, description="Standard deviation of initial weights.")


class MLP(nn.Module):
    """y = W_down act(W_up x + b_up) + b_down, position by position (arXiv 1706.03762).

    Args:
        config: Widths, activation, and whether the projections are ternary.
    """

    def __init__(self, config: MLPConfig) -> None:
        super().__init__()
        self.up = make_linear(config.hidden_size, config.ffn_hidden_size, bitnet=config.use_bitnet)
        self.down = make_linear(config.ffn_hidden_size, config.hidden_size, bitnet=config.use_bitnet)
        self.activation = config.ffn_activation
        for layer in (self.up, self.down):
            nn.init.normal_(layer.weight, std=config.initializer_range)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, segments: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Map x (B, L, D) to (B, L, D); no position sees another, so ``segments`` changes nothing at real tokens.

        Args:
            x: (B, L, D).
            segments: (B, L) document ids, 0 at padding; not read.

        Returns:
            (B, L, D), whatever b_up and b_down make of it at padding, and no auxiliary values.
        """
        return self.down(ACTIVATIONS[self.activation](self.up(x))), {}


SPEC = BlockSpec(
    name="mlp",
    kind="ffn",
    module=MLP,
    config=MLPConfig,
    paper="arXiv 1706.03762",
    equation="y = W_down act(W_up x + b_up) + b_down",
    state_size=lambda config: 0,
)
