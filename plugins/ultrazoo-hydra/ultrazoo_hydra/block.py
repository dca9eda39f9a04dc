"""Hydra: a mixer with a quasiseparable matrix; a token's past, its future and itself have terms of their own."""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from ultrazoo.nn.bitlinear import make_linear
from ultrazoo.nn.conv import SegmentConv1d
from ultrazoo.nn.delta import DeltaConfig, delta_statistics, initial_delta_bias
from ultrazoo.nn.norms import NormConfig, RMSNorm
from ultrazoo.nn.saturate import saturate
from ultrazoo.nn.segments import Gaps, mask_padding, starts
from ultrazoo.ops import selective_scan
from ultrazoo.spec import BlockSpec

HEAD_WIDTH = 64
"""Channels of a head as published."""
LEAST_HEADS = 4
"""Heads of a narrow model: D of a single one would be a mere scale, which the norm cancels."""


class HydraConfig(DeltaConfig):
    """Options of ``hydra``."""

    hidden_size: int = Field(gt=0, description="Model width D.")
    use_bitnet: bool = Field(default=False, description="in_proj and out_proj are BitLinear.")
    initializer_range: float = Field(default=0.02, gt=0, description="Standard deviation of the initial projections.")
    norm_eps: float = Field(default=1e-5, gt=0, description="Epsilon of the norm before the gate.")
    d_state: int = Field(default=64, gt=0, description="State N of each inner channel and direction.")
    d_conv: int = Field(default=7, gt=0, description="Taps W of the convolution, centred.")
    expand: int = Field(default=2, gt=0, description="Inner width E as a multiple of hidden_size.")
    headdim: int | None = Field(
        default=None, gt=0, description="Channels P of a head; unset, the largest divisor of E up to 64 and to E / 4."
    )

    @model_validator(mode="after")
    def _check_headdim(self) -> HydraConfig:
        if self.headdim is not None and self.inner_size % self.headdim:
            nearest = min(_divisors(self.inner_size), key=lambda n: abs(n - self.head_width))
            raise ValueError(
                f"got headdim {self.headdim}, expected a divisor of the inner width {self.inner_size} = expand x "
                f"hidden_size; nearest: {nearest}"
            )
        return self

    @property
    def inner_size(self) -> int:
        """Inner width E."""
        return self.expand * self.hidden_size

    @property
    def head_width(self) -> int:
        """Channels P of a head."""
        limit = max(1, min(HEAD_WIDTH, self.inner_size // LEAST_HEADS))
        return self.headdim or max(n for n in _divisors(self.inner_size) if n <= limit)

    @property
    def num_heads(self) -> int:
        """Heads H = E / P."""
        return self.inner_size // self.head_width


class Hydra(nn.Module):
    """y = shift(SS(u)) + flip(shift(SS'(flip(u)))) + d u, d = u W_d + D by head: a quasiseparable matrix (2407.09941).

    SS and SS' are selective scans of the same u in the two directions, with rates A = -exp(A_log) and a bias of delta
    that they share, and a delta, B and C each. As in Mamba-2, A and delta are one number for each head of P channels,
    and B and C are common to all heads. The shift by one token empties the diagonal of both, so that a token's own
    weight is d alone. u, B and C come from one projection and one centred depthwise convolution with SiLU; the result
    is normalised, gated by SiLU(z) and projected. Documents are scanned, shifted and convolved apart.

    The scans are ``ultrazoo.ops.selective_scan``, whose A is (E, N) and whose delta is (B, L, E): the head's A stands
    in all of its P x N entries, and its delta in all of its P channels.

    Under ``use_bitnet`` only in_proj and out_proj are quantised, as in ``mamba``.

    Args:
        config: Width and options.
    """

    def __init__(self, config: HydraConfig) -> None:
        super().__init__()
        width, inner, heads = config.hidden_size, config.inner_size, config.num_heads
        self.state, self.head_width = config.d_state, config.head_width
        self.in_proj = make_linear(width, 2 * inner, bias=False, bitnet=config.use_bitnet)  # z, u
        self.state_proj = nn.Linear(width, 4 * config.d_state + 2 * heads, bias=False)  # (B, C) x 2, delta x 2
        channels = inner + 4 * config.d_state
        self.conv = SegmentConv1d(channels, channels, config.d_conv, groups=channels)
        self.dt_bias = nn.Parameter(initial_delta_bias(config, heads))
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.D = nn.Parameter(torch.ones(heads))
        self.diagonal = nn.Linear(inner, heads, bias=False)  # W_d
        self.norm = RMSNorm(NormConfig(hidden_size=inner, norm_eps=config.norm_eps))
        self.out_proj = make_linear(inner, width, bias=False, bitnet=config.use_bitnet)
        for layer in (self.in_proj, self.state_proj, self.diagonal, self.out_proj):
            nn.init.normal_(layer.weight, std=config.initializer_range)
        for parameter in (self.dt_bias, self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        """Mix the tokens of each document.

        Args:
            x: (B, L, D).
            segments: (B, L) int64, or None.

        Returns:
            (B, L, D), zero at padding.
        """
        x = mask_padding(x, segments)
        projected, steering = self.in_proj(x), self.state_proj(x)
        # u, delta, B and C multiply one another: out of fp16's range long before they are out of the ordinary
        dtype = torch.float32 if projected.dtype is torch.float16 else projected.dtype
        z, u = projected.to(dtype).chunk(2, dim=2)  # (B, L, E) each
        with torch.autocast(x.device.type, enabled=False):
            y = self.mix(u, steering.to(dtype), segments)
            y = self.norm(y) * F.silu(z)
        return saturate(self.out_proj(saturate(y.to(projected.dtype))))

    def mix(self, u: Tensor, steering: Tensor, segments: Tensor | None = None) -> Tensor:
        """Apply the quasiseparable matrix of each head and document.

        Args:
            u: (B, L, E), zero at padding, before the convolution.
            steering: (B, L, 4N + 2H), in the dtype of u: B and C ahead, B and C back, delta ahead, delta back.
            segments: (B, L) int64, or None.

        Returns:
            (B, L, E), zero at padding.
        """
        gaps = Gaps.of(segments)  # the shift is by one place in the row
        u, steering, segments = gaps.close(u), gaps.close(steering), gaps.segments
        state, heads = self.state, self.A_log.numel()
        raw, delta = steering.split((4 * state, 2 * heads), dim=2)
        mixed = F.silu(self.conv(torch.cat((u, raw), dim=2), segments))
        u, B, C, B_back, C_back = mixed.split((u.shape[2], *4 * (state,)), dim=2)
        ahead, back = delta.chunk(2, dim=2)  # (B, L, H) each
        y = _after(self._scan(u, ahead, B, C, segments, reverse=False), segments)
        y = y + _before(self._scan(u, back, B_back, C_back, segments, reverse=True), segments)
        d = F.linear(u, self.diagonal.weight.to(u.dtype), self.D.to(u.dtype))  # (B, L, H)
        return gaps.open(y + u * self._by_channel(d))

    def _scan(
        self, u: Tensor, delta: Tensor, B: Tensor, C: Tensor, segments: Tensor | None, *, reverse: bool
    ) -> Tensor:
        wide = torch.promote_types(self.A_log.dtype, torch.float32)
        rate = -self._by_channel(self.A_log.to(wide).exp())  # (E,)
        return selective_scan(
            u,
            self._by_channel(delta),
            rate.unsqueeze(1).expand(-1, self.state),
            B,
            C,
            delta_bias=self._by_channel(self.dt_bias.to(wide)),
            delta_softplus=True,
            segments=segments,
            reverse=reverse,
        )

    def _by_channel(self, x: Tensor) -> Tensor:
        """(..., H) -> (..., E): each head's number for each of its P channels."""
        return x.repeat_interleave(self.head_width, dim=-1)

    def statistics(self) -> dict[str, Tensor]:
        """See ``delta_statistics``."""
        return delta_statistics(self.dt_bias, self.A_log)


def _after(y: Tensor, segments: Tensor | None) -> Tensor:
    """y_t-1 at t; 0 at the first token of a document."""
    moved = F.pad(y, (0, 0, 1, 0))[:, :-1]
    return moved if segments is None else moved.masked_fill(starts(segments).unsqueeze(2), 0)


def _before(y: Tensor, segments: Tensor | None) -> Tensor:
    """y_t+1 at t; 0 at the last token of a document."""
    moved = F.pad(y, (0, 0, 0, 1))[:, 1:]
    if segments is None:
        return moved
    last = F.pad(starts(segments)[:, 1:], (0, 1), value=True)  # padding starts anew, too
    return moved.masked_fill((last | segments.eq(0)).unsqueeze(2), 0)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _state_size(config: HydraConfig) -> int:
    """Two directions of N numbers for each inner channel, and the other W - 1 inputs of the convolution."""
    return 2 * config.inner_size * config.d_state + (config.d_conv - 1) * (config.inner_size + 4 * config.d_state)


SPEC = BlockSpec(
    name="hydra",
    kind="mixer",
    module=Hydra,
    config=HydraConfig,
    paper="arXiv 2407.09941",
    equation="y = shift(SS(u)) + flip(shift(SS'(flip(u)))) + (u W_d + D) u, SS and SS' selective scans",
    ops=("ultrazoo::selective_scan",),
    bidirectional=True,
    state_size=_state_size,
)
