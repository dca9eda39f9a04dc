"""Dropout as every part of the model applies it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ultrazoo import ops


def drop(x: Tensor, p: float, training: bool) -> Tensor:
    """x / (1 - p) with probability 1 - p, else 0; x itself where p is 0 and outside of training.

    On a CPU by ``ultrazoo.ops.dropout``; on other devices by torch, whose generator there counts as that one does.

    Args:
        x: (...).
        p: Probability of dropping, in [0, 1).
        training: Whether anything is dropped.
    """
    if not training or p == 0:
        return x
    return ops.dropout(x, p) if x.device.type == "cpu" else F.dropout(x, p)


class Dropout(nn.Dropout):
    """x / (1 - p) with probability 1 - p, else 0, in training; see ``drop``.

    Args:
        p: Probability of dropping, in [0, 1).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements of x (...)."""
        return drop(x, self.p, self.training)
