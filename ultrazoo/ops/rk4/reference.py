"""The algebra of one classic Runge-Kutta step, in plain torch.

h is the state at the start of the step and k1..k4 are the slopes, all of one shape (...). Sums are taken in fp32 (fp64
for fp64 inputs) and rounded once, to the dtype of h; results are contiguous. The gradients are plain multiples of the
incoming one, so they need no op of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rk4_combine_reference(h: Tensor, k1: Tensor, k2: Tensor, k3: Tensor, k4: Tensor, dt: float) -> Tensor:
    """h + dt / 6 * (k1 + 2 k2 + 2 k3 + k4)."""
    wide = torch.promote_types(h.dtype, torch.float32)
    slopes = k1.to(wide) + k4.to(wide) + 2 * (k2.to(wide) + k3.to(wide))
    return (h.to(wide) + (dt / 6) * slopes).to(h.dtype).contiguous()


def rk4_stage_reference(h: Tensor, k: Tensor, c: float) -> Tensor:
    """h + c * k."""
    wide = torch.promote_types(h.dtype, torch.float32)
    return (h.to(wide) + c * k.to(wide)).to(h.dtype).contiguous()
