"""Finds losses, gradients and weights that are not finite."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ultrazoo.errors import NonFiniteError
from ultrazoo.train.statistics import largest


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Steps whose loss or gradient norm was not finite, as one look finds them."""

    step: int
    """The first of them."""
    found_at: int
    """The step of the look. From ``step`` to here no update was applied."""
    bad: int
    """How many of these steps were not finite."""
    streak: int
    """How many of them in a row, up to the look and across earlier ones."""

    @property
    def held(self) -> int:
        """Updates that were not applied."""
        return self.found_at - self.step + 1


class FiniteGuard:
    """Marks steps whose loss or gradient norm is not finite, on the device, and reports them at intervals.

    Between looks nothing waits for the device: the mark itself keeps the optimiser's kernel from updating. From the
    first bad step to the next look every update is held back, so that whoever looks finds the weights that this step
    began with.

    Args:
        interval: Optimiser steps between looks.
        device: Where losses live.
    """

    def __init__(self, interval: int, device: torch.device) -> None:
        self.interval = interval
        self._first = torch.zeros((), device=device)
        """Steps are counted from 1, so 0 means none."""
        self._bad = torch.zeros((), device=device)
        self._streak = torch.zeros((), device=device)

    def mark(self, step: int, loss: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """Return 1.0 on the device if the update of this step must be held back, else 0.0."""
        bad = torch.isfinite(loss + norm).logical_not().to(torch.float32)
        self._first += (self._first == 0) * bad * step
        self._bad += bad
        self._streak = (self._streak + bad) * bad
        return (self._first > 0).to(torch.float32)

    def due(self, step: int) -> bool:
        """True at the steps that wait for the device and look."""
        return step % self.interval == 0

    def look(self, step: int) -> Fault | None:
        """Return what was bad since the last look, and let updates through again; None if nothing was."""
        first, bad, streak = (int(value) for value in torch.stack([self._first, self._bad, self._streak]).tolist())
        if first == 0:
            return None
        self._first.zero_()
        self._bad.zero_()
        return Fault(step=first, found_at=step, bad=bad, streak=streak)

    def state_dict(self) -> dict[str, int]:
        """JSON values for a checkpoint, which is written after a look."""
        return {"streak": int(self._streak)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a checkpoint; from one that has no such state, begin anew."""
        self._streak.fill_(state.get("streak", 0))

    def forgive(self) -> None:
        """Begin the streak anew, with other weights."""
        self._streak.zero_()


def require_finite(tensors: dict[str, torch.Tensor], what: str) -> None:
    """Refuse tensors that hold a NaN or an infinity, such as weights about to be saved.

    Raises:
        NonFiniteError: Names the first such tensor.
    """
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()}
    by_device: dict[torch.device, list[str]] = {}
    for name, tensor in floating.items():
        by_device.setdefault(tensor.device, []).append(name)
    for names in by_device.values():
        finite = torch.isfinite(largest([floating[name].detach() for name in names]))
        if not bool(finite.all()):
            bad = [name for name, good in zip(names, finite.tolist(), strict=True) if not good]
            raise NonFiniteError(
                f"{what}: {bad[0]} holds values that are not finite ({len(bad)} of {len(names)} tensors); "
                "no checkpoint is written, the earlier ones are kept; lower training.learning_rate"
            )
