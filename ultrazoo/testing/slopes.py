"""Derivatives by finite differences, for comparison with those of autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

STEPS = (1e-5, 1e-6)
"""The shorter step is for functions that bend, or have an edge, within the longer one."""


def slope(objective: Callable[[], Tensor], value: Tensor, along: Tensor) -> float:
    """Return the derivative of a scalar along a direction, from central differences in fp64.

    Differences of step h and h / 2 are extrapolated to step 0 (Richardson), so that the error falls with h^4. Of two
    such estimates the one counts whose extrapolation moved the difference least: the choice does not know what autograd
    says.

    Args:
        objective: Computes the scalar from the current numbers of ``value``.
        value: A leaf, moved and put back.
        along: The direction, of the shape of ``value``.
    """
    kept = value.detach().clone()

    @torch.no_grad()
    def difference(step: float) -> float:
        ends = []
        for sign in (1, -1):
            value.copy_(kept).add_(along, alpha=sign * step)
            ends.append(objective().item())
        value.copy_(kept)
        return (ends[0] - ends[1]) / (2 * step)

    found = []
    for step in STEPS:
        wide, narrow = difference(step), difference(step / 2)
        best = narrow + (narrow - wide) / 3
        found.append((abs(best - narrow), best))
    return min(found)[1]
