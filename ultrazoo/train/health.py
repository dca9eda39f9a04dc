"""Finds losses and gradients that are not finite, and sums up gradients per block."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from ultrazoo.errors import NonFiniteError


class FiniteGuard:
    """Marks steps whose loss or gradient norm is not finite, on the device, and reports them at intervals.

    Between checks nothing waits for the device: the mark itself keeps the optimiser's kernel from updating.

    Args:
        interval: Optimiser steps between checks.
        device: Where losses live.
    """

    def __init__(self, interval: int, device: torch.device) -> None:
        self.interval = interval
        self._first_bad = torch.zeros((), device=device)
        """Steps are counted from 1, so 0 means none."""

    def look(self, step: int, loss: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """Return 1.0 on the device if the step must not be taken, else 0.0, and remember the first such step."""
        bad = torch.isfinite(loss + norm).logical_not().to(torch.float32)
        self._first_bad += (self._first_bad == 0) * bad * step
        return bad

    def due(self, step: int) -> bool:
        """True at the steps that wait for the device and look."""
        return step % self.interval == 0

    def check(self, step: int, loss: torch.Tensor, norm: torch.Tensor, last_checkpoint: Path | None) -> None:
        """Stop the run if this step, or one since the last check, was not finite.

        Raises:
            NonFiniteError: Names the first bad step; its update was not applied.
        """
        first = int(self._first_bad.item())
        if first == 0:
            return
        here = f"loss {loss.item():g}, gradient norm {norm.item():g}"
        what = here if first == step else f"loss or gradient norm not finite (found at the check of step {step})"
        raise NonFiniteError(
            f"step {first}: {what}, expected finite numbers; the update was not applied, so the weights are those of "
            f"step {first - 1}{' and finite steps after it' if first < step else ''}; "
            f"last good checkpoint: {last_checkpoint or 'none'}; "
            "lower training.learning_rate or training.max_grad_norm, or set training.use_amp to false"
        )


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
        finite = torch.isfinite(_largest([floating[name].detach() for name in names]))
        if not bool(finite.all()):
            bad = [name for name, good in zip(names, finite.tolist(), strict=True) if not good]
            raise NonFiniteError(
                f"{what}: {bad[0]} holds values that are not finite ({len(bad)} of {len(names)} tensors); "
                "no checkpoint is written, the earlier ones are kept; lower training.learning_rate"
            )


def _largest(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Largest absolute value of each; NaN where there is one."""
    ends = [torch.stack(torch.aminmax(tensor)) for tensor in tensors]  # ten times faster on a CPU than the inf-norm
    return torch.stack([end.float() for end in ends]).abs().amax(1)


def block_of(name: str) -> str:
    """Name of the block that owns a parameter: ``layers.3.mixer.q.weight`` -> ``layers.3.mixer``."""
    parts = name.split(".")[:-1] or [name]
    if len(parts) > 1 and parts[1].isdigit():
        return ".".join(parts[:3])
    return parts[0]


def gradient_statistics(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, dict[str, float]]:
    """Per block: Euclidean norm, mean and largest absolute value, and share of exact zeros of the gradient.

    Args:
        parameters: Names and parameters; those without a gradient are left out.
    """
    named = [(block_of(name), parameter.grad) for name, parameter in parameters if parameter.grad is not None]
    gradients: list[torch.Tensor] = [gradient for _, gradient in named]
    if not gradients:
        return {}
    columns = [torch.stack(torch._foreach_norm(gradients)), torch.stack(torch._foreach_norm(gradients, 1))]
    columns += [_largest(gradients), torch.stack([torch.count_nonzero(gradient) for gradient in gradients])]
    table = torch.stack([column.float() for column in columns]).tolist()
    sums: dict[str, list[float]] = {}
    for index, (block, gradient) in enumerate(named):
        square, total, largest, filled, size = sums.setdefault(block, [0.0] * 5)
        norm, absolute, peak, nonzero = (column[index] for column in table)
        sums[block] = [
            square + norm**2,
            total + absolute,
            max(largest, peak),
            filled + nonzero,
            size + gradient.numel(),
        ]
    return {
        block: {"norm": square**0.5, "mean_abs": total / size, "max": largest, "zero_share": 1 - filled / size}
        for block, (square, total, largest, filled, size) in sums.items()
    }
