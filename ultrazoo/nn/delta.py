"""delta, how far a token moves a selective scan on: its options, its start, what it says of the state."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from ultrazoo.nn.block_config import BlockConfig


class DeltaConfig(BlockConfig):
    """Options of a block whose scans move on by delta = softplus(. + bias) at each token."""

    dt_min: float = Field(default=1e-3, gt=0, description="Shortest initial delta, in tokens.")
    dt_max: float = Field(default=1e-1, gt=0, description="Longest initial delta, in tokens.")
    dt_init_floor: float = Field(default=1e-4, gt=0, description="Initial deltas are raised to this at least.")

    @model_validator(mode="after")
    def _check_delta_range(self) -> DeltaConfig:
        if self.dt_min > self.dt_max:
            raise ValueError(f"got dt_min {self.dt_min} with dt_max {self.dt_max}, expected no more; swap them")
        return self


def initial_delta_bias(config: DeltaConfig, count: int) -> Tensor:
    """Draw biases whose softplus is log-uniform in [dt_min, dt_max] (arXiv 2312.00752, section 3.6); (count,)."""
    low, high = math.log(config.dt_min), math.log(config.dt_max)
    delta = torch.empty(count).uniform_(low, high).exp().clamp(min=config.dt_init_floor)
    return delta + torch.log(-torch.expm1(-delta))


def delta_statistics(bias: Tensor, A_log: Tensor) -> dict[str, Tensor]:
    """What a token that says nothing of its own, delta = softplus(bias), does to the state; A = -exp(A_log).

    Args:
        bias: Biases of delta, of a shape that broadcasts with A_log.
        A_log: Logarithms of the rates.

    Returns:
        ``step``, the mean delta in tokens; ``forget``, the mean share 1 - exp(delta A) of the state that is lost at a
        token; ``retained_tokens``, the geometric mean of 1 / -(delta A). Scalars in float32.
    """
    delta = F.softplus(bias.detach().float())
    rate = delta * A_log.detach().float().exp()
    return {
        "step": delta.mean(),
        "forget": -torch.expm1(-rate).mean(),
        "retained_tokens": rate.log().mean().neg().exp(),
    }
