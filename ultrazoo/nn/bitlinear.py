"""Linear layers as blocks ask for them: full precision, or BitNet b1.58."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ultrazoo.ops import bitlinear

NORM_EPS = 1e-5
SCALE_EPS = 1e-5


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer computes on x: autocast's where it is on, else that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def ternary_ste(weight: Tensor) -> Tensor:
    """clamp(round(W s), -1, 1) / s, s = 1 / mean|W| over the last two dimensions; the gradient passes unchanged.

    Args:
        weight: (..., out, in); each leading index is a matrix with a scale of its own.
    """
    mean = weight.detach().abs().mean(dim=(-2, -1), keepdim=True).clamp(min=SCALE_EPS)
    return weight + ((weight / mean).round().clamp(-1, 1) * mean - weight).detach()


def int8_ste(x: Tensor) -> Tensor:
    """clamp(round(x t), -128, 127) / t, t = 127 / max|x| over the last dimension; the gradient passes unchanged.

    Args:
        x: (..., D).
    """
    peak = x.detach().abs().amax(dim=-1, keepdim=True).clamp(min=SCALE_EPS)
    return x + ((x * (127 / peak)).round().clamp(-128, 127) * (peak / 127) - x).detach()


class BitLinear(nn.Linear):
    """y = Q8(RMSNorm(x)) Qt(W)^T + b, ternary weights and int8 activations per token (BitNet b1.58, arXiv 2402.17764).

    Qt(W) = clamp(round(W s), -1, 1) / s with s = 1 / mean|W|; Q8(x) = round(x t) / t with t = 127 / max|x| over the
    last dimension; gradients pass straight through both. The master weight stays in full precision, so training costs
    no less memory than ``nn.Linear``.

    The RMSNorm is over the last dimension and has a gain: a ternary matrix has one scale for the whole of it, so the
    gain is the only place where the layer can weigh its input channels. It adds ``in_features`` parameters.

    Args:
        in_features: Width of the last dimension of x.
        out_features: Width of the result.
        bias: Add b, in full precision.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.norm = nn.RMSNorm(in_features, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in_features) to (..., out_features), in the autocast dtype where autocast is on."""
        wide = torch.promote_types(x.dtype, self.norm.weight.dtype)
        normed = F.rms_norm(x.to(wide), (self.in_features,), self.norm.weight.to(wide), NORM_EPS)
        return bitlinear(normed.to(autocast_dtype(x)), self.weight, self.bias, eps=SCALE_EPS)


def make_linear(in_features: int, out_features: int, *, bias: bool = True, bitnet: bool = False) -> nn.Linear:
    """Return ``BitLinear`` when ``bitnet``, else ``nn.Linear``.

    Args:
        in_features: Width of the last dimension of the input.
        out_features: Width of the result.
        bias: Add a learned bias.
        bitnet: Quantise as BitNet b1.58; the layer then holds an RMSNorm of its input.
    """
    return BitLinear(in_features, out_features, bias) if bitnet else nn.Linear(in_features, out_features, bias)
