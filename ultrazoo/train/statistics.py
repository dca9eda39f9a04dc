"""What is recorded of single blocks: their gradients, their updates, and what they tell of themselves."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ultrazoo.train.team import Team


def block_of(name: str) -> str:
    """Name of the block that owns a parameter: ``layers.3.mixer.q.weight`` -> ``layers.3.mixer``."""
    parts = name.split(".")[:-1] or [name]
    if len(parts) > 1 and parts[1].isdigit():
        return ".".join(parts[:3])
    return parts[0]


def largest(tensors: list[Tensor]) -> Tensor:
    """Largest absolute value of each; NaN where there is one."""
    # of a shard that has no element: 0
    ends = [
        torch.stack(torch.aminmax(t if t.numel() else t.new_zeros(1))) for t in tensors
    ]  # ten times faster on a CPU than the inf-norm
    return torch.stack([end.float() for end in ends]).abs().amax(1)


def gradient_statistics(
    parameters: Iterable[tuple[str, nn.Parameter]], team: Team | None = None
) -> dict[str, dict[str, float]]:
    """Per block: Euclidean norm, mean and largest absolute value, and share of exact zeros of the gradient.

    Args:
        parameters: Names and parameters; those without a gradient are left out.
        team: The processes that each have a part of every gradient; None: this one has the whole.
    """
    named = [(block_of(name), parameter.grad) for name, parameter in parameters if parameter.grad is not None]
    gradients: list[Tensor] = [gradient for _, gradient in named]
    if not gradients:
        return {}
    columns = [torch.stack(torch._foreach_norm(gradients)), torch.stack(torch._foreach_norm(gradients, 1))]
    columns += [largest(gradients), torch.stack([torch.count_nonzero(gradient) for gradient in gradients])]
    table = torch.stack([column.float() for column in columns]).tolist()
    sums: dict[str, list[float]] = {}
    peaks: dict[str, list[float]] = {}
    for index, (block, gradient) in enumerate(named):
        square, total, filled, size = sums.setdefault(block, [0.0] * 4)
        norm, absolute, top, nonzero = (column[index] for column in table)
        sums[block] = [square + norm**2, total + absolute, filled + nonzero, size + gradient.numel()]
        peaks[block] = [_peak(peaks.get(block, [0.0])[0], top)]
    if team is not None:
        sums, peaks = team.merge(sums), team.merge(peaks, largest=True)
    return {
        block: {"norm": square**0.5, "mean_abs": total / size, "max": peaks[block][0], "zero_share": 1 - filled / size}
        for block, (square, total, filled, size) in sums.items()
    }


def weight_statistics(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, dict[str, float]]:
    """Per block: Euclidean norm and largest absolute value of the weights."""
    named = [(block_of(name), parameter.detach()) for name, parameter in parameters]
    weights = [weight for _, weight in named]
    table = torch.stack([torch.stack(torch._foreach_norm(weights)).float(), largest(weights)]).tolist()
    found: dict[str, dict[str, float]] = {}
    for (block, _), norm, top in zip(named, *table, strict=True):
        entry = found.setdefault(block, {"norm": 0.0, "max": 0.0})
        entry["norm"], entry["max"] = (entry["norm"] ** 2 + norm**2) ** 0.5, _peak(entry["max"], top)
    return found


def _peak(old: float, new: float) -> float:
    """The larger one; NaN if either is."""
    return math.nan if math.isnan(old) or math.isnan(new) else max(old, new)


def module_statistics(model: nn.Module) -> dict[str, dict[str, float]]:
    """Per block: what its modules' ``statistics()`` say, the mean over the modules that have the same entry.

    The method is optional; it returns named scalars, detached and cheap: a few passes over the module's parameters.
    """
    told: list[tuple[str, str, Tensor]] = []
    with torch.no_grad():
        for name, module in model.named_modules():
            if callable(tell := getattr(module, "statistics", None)):
                told += [(block_of(f"{name}."), key, _whole(value).float()) for key, value in tell().items()]
    if not told:
        return {}
    values: dict[str, dict[str, list[float]]] = {}
    for (block, key, _), value in zip(told, torch.stack([value for _, _, value in told]).tolist(), strict=True):
        values.setdefault(block, {}).setdefault(key, []).append(value)
    return {
        block: {key: sum(numbers) / len(numbers) for key, numbers in entries.items()}
        for block, entries in values.items()
    }


def _whole(value: Tensor) -> Tensor:
    """A scalar that was computed from shards, as a plain tensor."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


class BlockReport:
    """Statistics of one step by block: made between the backward pass and the update, read after the update.

    Until then it holds a copy of the weights: the update is measured as what really changed, whatever the optimiser.

    Args:
        model: The model.
        parameters: Its trained parameters by name.
        team: The processes that each have a part of every parameter; None: this one has the whole.
    """

    def __init__(self, model: nn.Module, parameters: list[tuple[str, nn.Parameter]], team: Team | None = None) -> None:
        self._model, self._team = model, team
        self._gradients = gradient_statistics(parameters, team)
        self._named = [(block_of(name), parameter.detach()) for name, parameter in parameters]
        self._before = [weight.clone() for _, weight in self._named]

    def read(self) -> dict[str, Any]:
        """Return ``gradients``, with ``update_ratio`` |W' - W| / |W'| in each block, and ``blocks`` if one tells."""
        weights = [weight for _, weight in self._named]
        torch._foreach_sub_(self._before, weights)
        norms = torch.stack([torch.stack(torch._foreach_norm(part)).float() for part in (self._before, weights)])
        self._before = []
        squares: dict[str, list[float]] = {}
        for (block, _), update, weight in zip(self._named, *norms.tolist(), strict=True):
            entry = squares.setdefault(block, [0.0, 0.0])
            entry[0], entry[1] = entry[0] + update**2, entry[1] + weight**2
        squares = self._team.merge(squares) if self._team is not None else squares
        for block, gradient in self._gradients.items():
            update, weight = squares[block]
            gradient["update_ratio"] = (update / weight) ** 0.5 if weight else 0.0
        told = module_statistics(self._model)
        return {"gradients": self._gradients, **({"blocks": told} if told else {})}
