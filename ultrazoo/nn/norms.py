"""The four norms: ``layer_norm`` and ``rms_norm`` measure each vector, ``dynamic_tanh`` and ``derf`` only bound it."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ultrazoo.nn.block_config import BlockConfig
from ultrazoo.spec import BlockSpec


class NormConfig(BlockConfig):
    """Options of every norm."""

    hidden_size: int = Field(gt=0, description="Width D of the last dimension.")
    norm_eps: float = Field(
        default=1e-5,
        gt=0,
        description="Added to the variance or the mean square; dynamic_tanh and derf divide by nothing and ignore it.",
    )


class LayerNorm(nn.LayerNorm):
    """y = gamma (x - mean(x)) / sqrt(var(x) + eps) + beta over the last dimension (arXiv 1607.06450).

    Args:
        config: Width and eps.
    """

    def __init__(self, config: NormConfig) -> None:
        super().__init__(config.hidden_size, eps=config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., D); statistics in the wider of the dtypes of x and gamma, result in that of x."""
        wide = torch.promote_types(x.dtype, self.weight.dtype)
        y = F.layer_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.bias.to(wide), self.eps)
        return y.to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """y = gamma x / sqrt(mean(x^2) + eps) over the last dimension (arXiv 1910.07467).

    Args:
        config: Width and eps.
    """

    def __init__(self, config: NormConfig) -> None:
        super().__init__(config.hidden_size, eps=config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., D); statistics in the wider of the dtypes of x and gamma, result in that of x."""
        wide = torch.promote_types(x.dtype, self.weight.dtype)
        return F.rms_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.eps).to(x.dtype)


class DynamicTanh(nn.Module):
    """y = gamma tanh(alpha x) + beta, alpha one learned scalar, no statistics (DyT, arXiv 2503.10622).

    Args:
        config: Width; eps has no part in it.
    """

    has_statistics = False

    def __init__(self, config: NormConfig) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), 0.5))
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """Squash x (..., D) channel by channel; computed in the wider of the dtypes of x and gamma."""
        wide = torch.promote_types(x.dtype, self.weight.dtype)
        return (self.weight * torch.tanh(self.alpha * x.to(wide)) + self.bias).to(x.dtype)


class Derf(nn.Module):
    """y = gamma erf(alpha x + s) + beta, alpha and s learned scalars, no statistics (Derf, arXiv 2512.10938).

    Args:
        config: Width; eps has no part in it.
    """

    has_statistics = False

    def __init__(self, config: NormConfig) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), 0.5))
        self.shift = nn.Parameter(torch.zeros(1))
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """Squash x (..., D) channel by channel; computed in the wider of the dtypes of x and gamma."""
        wide = torch.promote_types(x.dtype, self.weight.dtype)
        return (self.weight * torch.erf(self.alpha * x.to(wide) + self.shift) + self.bias).to(x.dtype)


SPECS = (
    BlockSpec(
        name="layer_norm",
        kind="norm",
        module=LayerNorm,
        config=NormConfig,
        paper="arXiv 1607.06450",
        equation="y = gamma (x - mean(x)) / sqrt(var(x) + eps) + beta",
        state_size=lambda config: 0,
    ),
    BlockSpec(
        name="rms_norm",
        kind="norm",
        module=RMSNorm,
        config=NormConfig,
        paper="arXiv 1910.07467",
        equation="y = gamma x / sqrt(mean(x^2) + eps)",
        state_size=lambda config: 0,
    ),
    BlockSpec(
        name="dynamic_tanh",
        kind="norm",
        module=DynamicTanh,
        config=NormConfig,
        paper="arXiv 2503.10622",
        equation="y = gamma tanh(alpha x) + beta",
        state_size=lambda config: 0,
    ),
    BlockSpec(
        name="derf",
        kind="norm",
        module=Derf,
        config=NormConfig,
        paper="arXiv 2512.10938",
        equation="y = gamma erf(alpha x + s) + beta",
        state_size=lambda config: 0,
    ),
)
