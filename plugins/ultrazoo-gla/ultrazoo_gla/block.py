"""The mixer of gated linear attention, in both directions."""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from ultrazoo.nn.bitlinear import make_linear
from ultrazoo.nn.block_config import BlockConfig
from ultrazoo.nn.saturate import saturate
from ultrazoo.nn.segments import mask_padding
from ultrazoo.spec import BlockSpec
from ultrazoo_gla.op import gated_linear_attention


class GLAConfig(BlockConfig):
    """Options of ``gla``."""

    hidden_size: int = Field(gt=0, description="Model width D.")
    num_heads: int = Field(gt=0, description="Heads H.")
    use_bitnet: bool = Field(default=False, description="The five wide projections are BitLinear; the gate's are not.")
    norm_eps: float = Field(default=1e-5, gt=0, description="Added to the mean square in each head's norm.")
    expand_k: float = Field(default=0.5, gt=0, description="Width of all keys as a multiple of hidden_size.")
    expand_v: float = Field(default=1.0, gt=0, description="Width of all values as a multiple of hidden_size.")
    gate_rank: int = Field(default=16, gt=0, description="Inner width of the gate's low-rank projection.")
    gate_temperature: float = Field(
        default=16.0, gt=0, description="tau: a gate is sigmoid(z)^(1 / tau), so a larger one forgets less."
    )

    @model_validator(mode="after")
    def _check_widths(self) -> GLAConfig:
        for name, factor in (("expand_k", self.expand_k), ("expand_v", self.expand_v)):
            width = factor * self.hidden_size
            if width != int(width) or int(width) % self.num_heads:
                raise ValueError(
                    f"got {name} {factor:g} x hidden_size {self.hidden_size} = {width:g} with {self.num_heads} "
                    f"num_heads, expected a multiple of num_heads; change {name} or num_heads"
                )
        return self

    @property
    def key_size(self) -> int:
        """Width of the keys of all heads."""
        return int(self.expand_k * self.hidden_size)

    @property
    def value_size(self) -> int:
        """Width of the values of all heads."""
        return int(self.expand_v * self.hidden_size)


class GLA(nn.Module):
    """y = (SiLU(X Wr + b) . norm(O)) Wo, O the gated linear attention of each head (GLA, arXiv 2312.06635).

    An encoder's: o_n = q_n S_n + q_n diag(b_n) T_n+1 with the states S_n = diag(a_n) S_n-1 + k_n v_n^T from the left
    and T_n = diag(b_n) T_n+1 + k_n v_n^T from the right, so a token counts its own value once. The gates are
    sigmoid(x W1 W2 + b)^(1 / tau), a number for each key channel; the two directions share q, k and v and have gates of
    their own (W1 is common, W2 and b are not), without which a token could not tell its left from its right. q is
    scaled by K^-0.5; the norm is RMS over each head's values with a gain that heads share. Positions are not encoded:
    the gates tell near from far.

    Args:
        config: Widths, heads and options.
    """

    def __init__(self, config: GLAConfig) -> None:
        super().__init__()
        width, keys, values = config.hidden_size, config.key_size, config.value_size
        self.heads, self.temperature, self.norm_eps = config.num_heads, config.gate_temperature, config.norm_eps
        self.q_proj = make_linear(width, keys, bias=False, bitnet=config.use_bitnet)
        self.k_proj = make_linear(width, keys, bias=False, bitnet=config.use_bitnet)
        self.v_proj = make_linear(width, values, bias=False, bitnet=config.use_bitnet)
        self.r_proj = make_linear(width, values, bias=True, bitnet=config.use_bitnet)
        self.gate_down = nn.Linear(width, config.gate_rank, bias=False)
        self.gate_up = nn.Linear(config.gate_rank, 2 * keys)
        self.norm_weight = nn.Parameter(torch.ones(values // config.num_heads))
        self.out_proj = make_linear(values, width, bias=False, bitnet=config.use_bitnet)
        self.norm_weight._no_weight_decay = True  # type: ignore[attr-defined]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every projection from Xavier's uniform distribution with gain 2^-2.5, as the authors do; no bias."""
        for layer in self.children():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight, gain=2**-2.5)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.ones_(self.norm_weight)

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        """Mix the tokens of each document.

        Args:
            x: (B, L, D).
            segments: (B, L) int64, or None.

        Returns:
            (B, L, D), zero at padding.
        """
        x = mask_padding(x, segments)
        q, k, v = (
            saturate(projection(x)).unflatten(2, (self.heads, -1))  # (B, L, H, K), the same, (B, L, H, V)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        o = gated_linear_attention(q * q.shape[3] ** -0.5, k, v, self.log_gate(x), segments=segments)
        wide = torch.promote_types(o.dtype, torch.float32)
        normed = F.rms_norm(saturate(o).to(wide), (o.shape[3],), self.norm_weight.to(wide), eps=self.norm_eps)
        gate = F.silu(saturate(self.r_proj(x)))
        y = saturate(self.out_proj(saturate(gate * normed.to(gate.dtype).flatten(2))))
        return mask_padding(y, segments)

    def log_gate(self, x: Tensor) -> Tensor:
        """Log gates of both directions, log sigmoid(x W1 W2 + b) / tau, in at least fp32: halves are too coarse.

        Args:
            x: (B, L, D).

        Returns:
            (B, L, 2, H, K): of the states from the left, then from the right.
        """
        z = saturate(self.gate_up(saturate(self.gate_down(x))))
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        return (F.logsigmoid(z) / self.temperature).unflatten(2, (2, self.heads, -1))

    def statistics(self) -> dict[str, Tensor]:
        """``retained_tokens``: 1 / -log_gate for a token that says nothing of its own (z = b); the geometric mean."""
        log_gate = F.logsigmoid(self.gate_up.bias.detach().float()) / self.temperature
        return {"retained_tokens": log_gate.neg().log().mean().neg().exp()}


def _state_size(config: GLAConfig) -> int:
    """Two directions of one (K, V) matrix a head."""
    return 2 * config.key_size * config.value_size // config.num_heads


SPEC = BlockSpec(
    name="gla",
    kind="mixer",
    module=GLA,
    config=GLAConfig,
    paper="arXiv 2312.06635",
    equation="y = (SiLU(x Wr) . norm(q_n S_n + q_n diag(b_n) T_n+1)) Wo, S_n = diag(a_n) S_n-1 + k_n v_n^T",
    ops=("gla::gated_linear_attention",),
    bidirectional=True,
    state_size=_state_size,
)
