"""Linear layers as blocks ask for them: full precision, or BitNet b1.58."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ultrazoo.errors import ArgumentTypeError
from ultrazoo.ops import bitlinear, bitlinear_packed, pack_ternary

if TYPE_CHECKING:
    from typing_extensions import Self

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


def ternary_shares(weight: Tensor) -> dict[str, Tensor]:
    """``ternary_zero`` is the share of zeros in clamp(round(W s), -1, 1), ``ternary_positive`` that of ones.

    Args:
        weight: (..., out, in), as for ``ternary_ste``.
    """
    half = weight.detach().abs().mean(dim=(-2, -1), keepdim=True).clamp(min=SCALE_EPS) / 2  # which rounds to 0
    positive, negative = (weight.detach() > half).float().mean(), (weight.detach() < -half).float().mean()
    return {"ternary_zero": 1 - positive - negative, "ternary_positive": positive}


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

    Where no gradient is asked for (validation, inference), the ternary weight is kept, packed, for as long as torch's
    version counter says that the weight is unchanged. Writes through ``weight.data`` are not counted: call ``train()``
    or ``eval()`` after them, which forget it too.

    Args:
        in_features: Width of the last dimension of x.
        out_features: Width of the result.
        bias: Add b, in full precision.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.norm = nn.RMSNorm(in_features, eps=NORM_EPS)
        self._packed: tuple[tuple[object, ...], tuple[Tensor, Tensor]] | None = None
        """What the packed weight was made from, and the weight: one value, so that threads may share the layer."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in_features) to (..., out_features), in the autocast dtype where autocast is on."""
        normed = _normed(x, self.norm.weight)
        if self._can_keep() and normed.dtype != torch.float64:
            return bitlinear_packed(normed, *self._ternary(), self.bias, eps=SCALE_EPS)
        return bitlinear(normed, self.weight, self.bias, eps=SCALE_EPS)

    def statistics(self) -> dict[str, Tensor]:
        """Shares of the ternary weight: see ``ternary_shares``."""
        return ternary_shares(self.weight)

    def train(self, mode: bool = True) -> Self:
        """Switch to training or evaluation, and forget the packed weight."""
        self._packed = None
        return super().train(mode)

    def _can_keep(self) -> bool:
        return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or self.weight.is_inference())

    def _ternary(self) -> tuple[Tensor, Tensor]:
        weight = self.weight
        made_from = (weight._version, weight.data_ptr(), weight.dtype, weight.device)
        kept = self._packed
        if kept is None or kept[0] != made_from:
            kept = self._packed = made_from, pack_ternary(weight, eps=SCALE_EPS)
        return kept[1]


class PackedBitLinear(nn.Module):
    """``BitLinear`` for inference: the weight in two bits a number, summed in integers; no gradient.

    Both widths are filled up to a multiple of 16 in memory: 64 ceil(N / 16) ceil(K / 16) bytes.

    ``packed`` and ``scale`` are those of ``ultrazoo.ops.pack_ternary``, whose docstring has the layout.

    Args:
        layer: The layer to take over; it is not changed.
    """

    packed: Tensor
    scale: Tensor

    def __init__(self, layer: BitLinear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.norm, self.bias = layer.norm, layer.bias
        packed, scale = pack_ternary(layer.weight, eps=SCALE_EPS)
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in_features) to (..., out_features), in the autocast dtype where autocast is on."""
        normed = _normed(x, self.norm.weight).detach()
        return bitlinear_packed(normed, self.packed, self.scale, self.bias, eps=SCALE_EPS)


def pack(model: nn.Module) -> nn.Module:
    """Replace every ``BitLinear`` inside a model by its packed form, in place, and return the model.

    The experts of a mixture keep their weights: they are not layers of their own.

    Raises:
        ArgumentTypeError: It is no module.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    if isinstance(model, BitLinear):
        return PackedBitLinear(model)
    for name, child in model.named_children():
        setattr(model, name, pack(child))
    return model


def _normed(x: Tensor, gain: Tensor) -> Tensor:
    """RMSNorm over the last dimension in x's dtype or the gain's, the wider, then in autocast's where it is on."""
    wide = torch.promote_types(x.dtype, gain.dtype)
    return F.rms_norm(x.to(wide), gain.shape, gain.to(wide), NORM_EPS).to(autocast_dtype(x))


def make_linear(in_features: int, out_features: int, *, bias: bool = True, bitnet: bool = False) -> nn.Linear:
    """Return ``BitLinear`` when ``bitnet``, else ``nn.Linear``.

    Args:
        in_features: Width of the last dimension of the input.
        out_features: Width of the result.
        bias: Add a learned bias.
        bitnet: Quantise as BitNet b1.58; the layer then holds an RMSNorm of its input.
    """
    return BitLinear(in_features, out_features, bias) if bitnet else nn.Linear(in_features, out_features, bias)
