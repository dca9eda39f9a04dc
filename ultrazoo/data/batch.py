"""What the trainer gets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ultrazoo.data.masking import Masker
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


def make_batch(tokens: NDArray[Any], segments: NDArray[Any], states: U64, masker: Masker) -> Batch:
    """Mask packed rows, each by its own random stream."""
    inputs, labels = masker(tokens, segments, states)
    return Batch(
        input_ids=torch.from_numpy(inputs),
        segments=torch.from_numpy(segments.astype(np.int64)),
        labels=torch.from_numpy(labels),
        num_tokens=int(np.count_nonzero(segments)),
    )
