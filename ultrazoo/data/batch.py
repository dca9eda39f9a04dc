"""What the trainer gets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ultrazoo.data.masking import NOT_A_TARGET, Masker
from ultrazoo.data.randomness import U64


@dataclass(frozen=True)
class Batch:
    """Masked rows, each tensor (B, L) int64.

    ``segments`` is 0 at padding and numbers the documents of a row from 1; ``labels`` is -100 where nothing is to be
    predicted; ``num_tokens`` counts the tokens that are not padding.
    """

    input_ids: torch.Tensor
    segments: torch.Tensor
    labels: torch.Tensor
    num_tokens: int

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on a device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            segments=self.segments.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class Share:
    """Which rows of every batch are this process's: part ``rank`` of ``size`` parts that follow one another."""

    rank: int = 0
    size: int = 1

    def of(self, rows: int) -> slice:
        """The rows among so many; none are lost and none are in two shares."""
        return slice(rows * self.rank // self.size, rows * (self.rank + 1) // self.size)


def make_batch(
    tokens: NDArray[Any],
    segments: NDArray[Any],
    states: U64,
    masker: Masker,
    share: Share = Share(),
) -> Batch:
    """Mask a share of packed rows, each by its own random stream; an empty share is one row without a target."""
    own = share.of(len(tokens))
    if own.start == own.stop and len(tokens):
        idle = make_batch(tokens[:1], segments[:1], states[:1], masker)
        return replace(idle, labels=torch.full_like(idle.labels, NOT_A_TARGET), num_tokens=0)
    tokens, segments, states = tokens[own], segments[own], states[own]
    inputs, labels = masker(tokens, segments, states)
    return Batch(
        input_ids=torch.from_numpy(inputs),
        segments=torch.from_numpy(segments.astype(np.int64)),
        labels=torch.from_numpy(labels),
        num_tokens=int(np.count_nonzero(segments)),
    )
