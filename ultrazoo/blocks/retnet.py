"""Bidirectional multi-scale retention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from ultrazoo.nn.bitlinear import make_linear
from ultrazoo.nn.block_config import BlockConfig
from ultrazoo.nn.rotary import rotate_pairs
from ultrazoo.nn.saturate import saturate
from ultrazoo.nn.segments import mask_padding, positions
from ultrazoo.ops import retention
from ultrazoo.spec import BlockSpec


class RetNetConfig(BlockConfig):
    """Options of ``retnet``."""

    hidden_size: int = Field(gt=0, description="Model width D.")
    retention_heads: int = Field(gt=0, description="Heads H; head h decays by 1 - 2^(-5-h) a token.")
    use_bitnet: bool = Field(default=False, description="The five projections are BitLinear.")
    norm_eps: float = Field(default=1e-5, gt=0, description="Added to the mean square in each head's norm.")
    value_factor: int = Field(default=2, gt=0, description="Width of values and gate as a multiple of hidden_size.")
    chunk_size: int | None = Field(
        default=None, gt=0, description="Tokens that one chunk of the retention holds; unset, the op chooses."
    )

    @model_validator(mode="after")
    def _check_head_width(self) -> RetNetConfig:
        if self.hidden_size % (2 * self.retention_heads):
            raise ValueError(
                f"got hidden_size {self.hidden_size} with {self.retention_heads} retention_heads, expected an even "
                "width for each head; choose retention_heads so that hidden_size is a multiple of twice their number"
            )
        return self


class RetNet(nn.Module):
    """y = (SiLU(X Wg) . norm(O)) Wo, O = (Q K^T . gamma^|n-m|) V for each head (RetNet, arXiv 2307.08621).

    An encoder's retention: the decay is symmetric, so a token counts its own value once and both sides alike. Q and K
    turn with the position (pair j by 10000^(-j / (K/2 - 1)) radians a token), K is scaled by K^-0.5, the norm is RMS
    over each head's values without a gain, and nothing has a bias. The paper's further score normalisations are
    positive factors a row, which the norm cancels.

    Args:
        config: Width, heads and options.
    """

    def __init__(self, config: RetNetConfig) -> None:
        super().__init__()
        width, values = config.hidden_size, config.hidden_size * config.value_factor
        self.heads = config.retention_heads
        self.norm_eps = config.norm_eps
        self.chunk_size = config.chunk_size
        self.q_proj = make_linear(width, width, bias=False, bitnet=config.use_bitnet)
        self.k_proj = make_linear(width, width, bias=False, bitnet=config.use_bitnet)
        self.v_proj = make_linear(width, values, bias=False, bitnet=config.use_bitnet)
        self.g_proj = make_linear(width, values, bias=False, bitnet=config.use_bitnet)
        self.out_proj = make_linear(values, width, bias=False, bitnet=config.use_bitnet)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the projections from Xavier's uniform distribution, gain 2^-2.5, and 2^-1 for the last."""
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.g_proj):
            nn.init.xavier_uniform_(projection.weight, gain=2**-2.5)
        nn.init.xavier_uniform_(self.out_proj.weight, gain=2**-1)

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        """Mix the tokens of each document.

        Args:
            x: (B, L, D).
            segments: (B, L) int64, or None.

        Returns:
            (B, L, D), zero at padding.
        """
        x = mask_padding(x, segments)
        where = positions(segments, x.shape[1], x.device)
        q = self.q_proj(x).unflatten(2, (self.heads, -1))  # (B, L, H, K)
        k = self.k_proj(x).unflatten(2, (self.heads, -1))
        v = self.v_proj(x).unflatten(2, (self.heads, -1))  # (B, L, H, V)
        pairs = q.shape[3] // 2
        frequencies = 10000.0 ** -torch.linspace(0, 1, pairs, device=x.device, dtype=torch.float64)
        q = rotate_pairs(q, where, frequencies)
        k = rotate_pairs(k, where, frequencies) * q.shape[3] ** -0.5
        o = retention(q, k, v, log_decay(self.heads, x.device), segments=segments, chunk_size=self.chunk_size)
        wide = saturate(o).to(torch.promote_types(o.dtype, torch.float32))
        normed = F.rms_norm(wide, (o.shape[3],), eps=self.norm_eps).to(o.dtype)
        gate = F.silu(self.g_proj(x))
        return saturate(self.out_proj(saturate(gate * normed.flatten(2))))

    def statistics(self) -> dict[str, Tensor]:
        """``retained_tokens``: 1 / -ln(gamma), the tokens after which a head has forgotten all but 1/e; their mean."""
        return {"retained_tokens": log_decay(self.heads).neg().reciprocal().mean()}


def log_decay(heads: int, device: torch.device | None = None) -> Tensor:
    """Return ln(1 - 2^(-5-h)) for each head, in fp32: in half precision the decays themselves round to 1.

    Args:
        heads: H.
        device: where the result lives.

    Returns:
        (H,) fp32.
    """
    exponents = -5.0 - torch.arange(heads, device=device, dtype=torch.float32)
    return torch.log1p(-torch.exp2(exponents))


def _state_size(config: RetNetConfig) -> int:
    """Two directions of one (K, V) matrix a head."""
    return 2 * config.hidden_size * config.hidden_size * config.value_factor // config.retention_heads


SPEC = BlockSpec(
    name="retnet",
    kind="mixer",
    module=RetNet,
    config=RetNetConfig,
    paper="arXiv 2307.08621",
    equation="y = (SiLU(X Wg) . norm((Q K^T . gamma^|n-m|) V)) Wo",
    ops=("ultrazoo::retention",),
    bidirectional=True,
    state_size=_state_size,
)
