"""Bidirectional selective state spaces."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ultrazoo.nn.bitlinear import make_linear
from ultrazoo.nn.conv import SegmentConv1d
from ultrazoo.nn.delta import DeltaConfig, delta_statistics, initial_delta_bias
from ultrazoo.nn.saturate import saturate
from ultrazoo.nn.segments import mask_padding
from ultrazoo.ops import selective_scan
from ultrazoo.spec import BlockSpec


class MambaConfig(DeltaConfig):
    """Options of ``mamba``."""

    hidden_size: int = Field(gt=0, description="Model width D.")
    num_layers: int = Field(default=1, gt=0, description="With num_loops, the depth that scales out_proj's start.")
    num_loops: int = Field(default=1, gt=0, description="Times that the layers are applied.")
    use_bitnet: bool = Field(default=False, description="in_proj and out_proj are BitLinear.")
    d_state: int = Field(default=16, gt=0, description="State N of each inner channel.")
    d_conv: int = Field(default=4, gt=0, description="Taps W of the convolution before each scan.")
    expand: int = Field(default=2, gt=0, description="Inner width E as a multiple of hidden_size.")
    dt_rank: int | None = Field(default=None, gt=0, description="Rank R of delta; unset, hidden_size / 16 rounded up.")

    @property
    def inner_size(self) -> int:
        """Inner width E."""
        return self.expand * self.hidden_size

    @property
    def rank(self) -> int:
        """Rank R of delta."""
        return math.ceil(self.hidden_size / 16) if self.dt_rank is None else self.dt_rank


class Mamba(nn.Module):
    """h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t, y_t = C_t h_t + D u_t, both ways (Mamba, arXiv 2312.00752).

    The two directions share in_proj, the gate z and out_proj, as in Vision Mamba's second version and Caduceus (arXiv
    2401.09417, 2403.03234); each has its own convolution (reading behind it), x_proj, dt_proj, A and D. Their outputs
    are added, so a token's own term enters twice, with the parameters of either direction: two learned terms, where
    Hydra's quasiseparable form (arXiv 2407.09941) has one.

    Under ``use_bitnet`` only in_proj and out_proj are quantised: delta, B, C, A and D steer a recurrence, in which
    errors of rounding add up along the row.

    Args:
        config: Width and options.
    """

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.inner_size
        self.in_proj = make_linear(width, 2 * inner, bias=False, bitnet=config.use_bitnet)
        self.ahead = SelectiveScan(config, side="left")
        self.back = SelectiveScan(config, side="right")
        self.out_proj = make_linear(inner, width, bias=False, bitnet=config.use_bitnet)
        with torch.no_grad():
            self.out_proj.weight.div_(math.sqrt(config.num_layers * config.num_loops))

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        """Mix the tokens of each document.

        Args:
            x: (B, L, D).
            segments: (B, L) int64, or None.

        Returns:
            (B, L, D), zero at padding.
        """
        both = self.in_proj(mask_padding(x, segments))
        # u, delta, B and C multiply one another: out of fp16's range long before they are out of the ordinary
        wide = both.float() if both.dtype is torch.float16 else both
        u, z = wide.chunk(2, dim=2)  # (B, L, E) each
        y = self.ahead(u, z, segments) + self.back(u, z, segments)
        return saturate(self.out_proj(saturate(y.to(both.dtype))))


class SelectiveScan(nn.Module):
    """y = scan(SiLU(conv(u))) . SiLU(z) in one direction, delta, B and C being functions of the token.

    Args:
        config: Width and options of the block.
        side: ``left`` reads what comes before a token, ``right`` what comes after it.
    """

    def __init__(self, config: MambaConfig, side: Literal["left", "right"]) -> None:
        super().__init__()
        inner, state, rank = config.inner_size, config.d_state, config.rank
        self.sizes = [rank, state, state]
        self.reverse = side == "right"
        self.conv = SegmentConv1d(inner, inner, config.d_conv, groups=inner, side=side)
        self.x_proj = nn.Linear(inner, rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.arange(1, state + 1, dtype=torch.float32).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner, dtype=torch.float32))
        self._start_delta(config)
        for parameter in (self.A_log, self.D, self.dt_proj.bias):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def _start_delta(self, config: MambaConfig) -> None:
        """Draw dt_proj: its bias for a log-uniform delta, its weights so small that the bias decides at first."""
        bound = config.rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        with torch.no_grad():
            self.dt_proj.bias.copy_(initial_delta_bias(config, config.inner_size))

    def forward(self, u: Tensor, z: Tensor, segments: Tensor | None = None) -> Tensor:
        """Scan each document.

        Args:
            u: (B, L, E), zero at padding; its dtype is that of the whole scan, whatever autocast says.
            z: (B, L, E), the gate before its SiLU, in the same dtype.
            segments: (B, L) int64, or None.

        Returns:
            (B, L, E), zero at padding.
        """
        wide = torch.promote_types(self.A_log.dtype, torch.float32)
        with torch.autocast(u.device.type, enabled=False):
            u = F.silu(self.conv(u, segments))  # zero at padding still: the convolution adds no bias there
            mixed = F.linear(u, self.x_proj.weight.to(u.dtype))
            dt, B, C = mixed.split(self.sizes, dim=2)  # (B, L, R), (B, L, N), (B, L, N)
            return selective_scan(
                u,
                F.linear(dt, self.dt_proj.weight.to(u.dtype)),
                -self.A_log.to(wide).exp(),
                B,
                C,
                self.D.to(wide),
                z=z,
                delta_bias=self.dt_proj.bias.to(wide),
                delta_softplus=True,
                segments=segments,
                reverse=self.reverse,
            )

    def statistics(self) -> dict[str, Tensor]:
        """See ``delta_statistics``; the token that says nothing of its own is the one with dt = 0."""
        return delta_statistics(self.dt_proj.bias.unsqueeze(1), self.A_log)


def _state_size(config: MambaConfig) -> int:
    """Two directions of N numbers and the last W - 1 inputs of the convolution for each inner channel."""
    return 2 * config.inner_size * (config.d_state + config.d_conv - 1)


SPEC = BlockSpec(
    name="mamba",
    kind="mixer",
    module=Mamba,
    config=MambaConfig,
    paper="arXiv 2312.00752",
    equation="h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t, y_t = C_t h_t + D u_t, both ways",
    ops=("ultrazoo::selective_scan",),
    bidirectional=True,
    state_size=_state_size,
)
