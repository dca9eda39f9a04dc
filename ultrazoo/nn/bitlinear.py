"""Linear layers as blocks ask for them: full precision, or BitNet b1.58."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_EPS = 1e-5


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
        self.norm = nn.RMSNorm(in_features, eps=_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in_features) to (..., out_features), in the autocast dtype where autocast is on."""
        from ultrazoo.ops import bitlinear

        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        wide = torch.promote_types(x.dtype, self.norm.weight.dtype)
        x = F.rms_norm(x.to(wide), (self.in_features,), self.norm.weight, _EPS)
        bias = None if self.bias is None else self.bias.to(dtype)
        return bitlinear(x.to(dtype), self.weight.to(dtype), bias)


def make_linear(in_features: int, out_features: int, *, bias: bool = True, bitnet: bool = False) -> nn.Linear:
    """Return ``BitLinear`` when ``bitnet``, else ``nn.Linear``.

    Args:
        in_features: Width of the last dimension of the input.
        out_features: Width of the result.
        bias: Add a learned bias.
        bitnet: Quantise as BitNet b1.58; the layer then holds an RMSNorm of its input.
    """
    return BitLinear(in_features, out_features, bias) if bitnet else nn.Linear(in_features, out_features, bias)
