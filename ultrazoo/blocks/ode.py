"""Attention as the vector field of a differential equation."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ultrazoo.nn.attention import AttentionConfig, AttentionProjections
from ultrazoo.nn.dropout import drop
from ultrazoo.nn.segments import mask_padding
from ultrazoo.ops import attention, rk4_combine, rk4_stage
from ultrazoo.spec import BlockSpec


class OdeConfig(AttentionConfig):
    """Options of ``ode``."""

    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Share of f's outputs dropped: the same ones at every stage of a forward."
    )
    ode_solver: Literal["rk4", "euler"] = Field(
        default="rk4", description="Integrator: classic Runge-Kutta (four evaluations of f a step) or Euler."
    )
    ode_steps: int = Field(default=2, gt=0, description="Equal steps over t in [0, 1].")
    recompute: bool = Field(
        default=True,
        description="The backward pass computes the stages again: memory of one state a step instead of every "
        "activation of every stage, for about 40 % more time.",
    )


class Ode(nn.Module):
    """y = h(1) - h(0), dh/dt = f(h), h(0) = x, f multi-head self-attention (neural ODE, arXiv 1806.07366).

    f does not depend on t and is one and the same function throughout a forward: its dropout mask is drawn once. The
    integrator carries the displacement h(t) - h(0), in fp32 or wider, so that a small change of a large state is not
    lost; Euler's method with one step returns f(x) exactly, which makes the layer a plain residual block. The gradient
    is that of the discrete steps (discretise, then optimise).

    Args:
        config: Width, heads, solver and options.
    """

    def __init__(self, config: OdeConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.solver = config.ode_solver
        self.steps = config.ode_steps
        self.recompute = config.recompute
        self.projections = AttentionProjections(config, rotary=config.position_embedding == "rope")

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        """Integrate the tokens of each document from t = 0 to 1.

        Args:
            x: (B, L, D), the state h(0).
            segments: (B, L) int64, or None.

        Returns:
            (B, L, D), the displacement h(1) - h(0), zero at padding.
        """
        x = mask_padding(x, segments)
        start = x.to(torch.promote_types(x.dtype, torch.float32))
        kept = drop(torch.ones_like(x), self.dropout, True) if self.training and self.dropout else None
        moved = torch.zeros_like(start)
        for _ in range(self.steps):
            arguments = (start, moved, segments, kept, x.dtype)
            if self.recompute and torch.is_grad_enabled():
                moved = checkpoint(self._step, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                moved = self._step(*arguments)
        return mask_padding(moved, segments).to(x.dtype)

    def _step(
        self,
        start: Tensor,
        moved: Tensor,
        segments: Tensor | None,
        kept: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """Advance the displacement by 1 / steps."""
        dt = 1 / self.steps
        h = start + moved

        def slope(state: Tensor) -> Tensor:
            return self._field(state.to(dtype), segments, kept)

        k1 = slope(h)
        if self.solver == "euler":
            return rk4_stage(moved, k1, dt)
        k2 = slope(rk4_stage(h, k1, dt / 2))
        k3 = slope(rk4_stage(h, k2, dt / 2))
        k4 = slope(rk4_stage(h, k3, dt))
        return rk4_combine(moved, k1, k2, k3, k4, dt)

    def _field(self, h: Tensor, segments: Tensor | None, kept: Tensor | None) -> Tensor:
        """Evaluate f: self-attention within documents."""
        q, k, v = self.projections.split(h, segments)  # (B, L, H, K) each
        y = self.projections.merge(attention(q, k, v, segments=segments))
        return y if kept is None else y * kept


SPEC = BlockSpec(
    name="ode",
    kind="mixer",
    module=Ode,
    config=OdeConfig,
    paper="arXiv 1806.07366",
    equation="y = h(1) - h(0), dh/dt = f(h), h(0) = x, f = self-attention",
    ops=("ultrazoo::attention", "ultrazoo::rk4_combine", "ultrazoo::rk4_stage"),
    bidirectional=True,
)
