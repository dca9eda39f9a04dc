"""Forward and backward passes of one optimiser step: the same for the trainer and for whoever repeats its step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ultrazoo.train.amp import Precision
from ultrazoo.train.team import Team, Totals

if TYPE_CHECKING:
    from ultrazoo.data import Batch


def accumulate(
    model: nn.Module,
    batches: Sequence[Batch],
    precision: Precision,
    team: Team | None = None,
    totals: Totals | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Leave the gradient of the mean loss over all targets, plus the auxiliary losses, in the parameters.

    Args:
        model: The model.
        batches: Micro-batches; auxiliary losses are weighted by their real tokens.
        precision: Device and dtype to run in.
        team: The processes that share the step; None: this one alone.
        totals: What the step holds over all of them; None: counted here.

    Returns:
        Detached scalars (``objective``, ``loss_sum``, ``targets`` and each auxiliary loss), and the statistics of the
        last micro-batch.
    """
    team = team or Team()
    totals = totals or team.totals(batches)
    tokens = max(1, totals.tokens)
    sums: dict[str, Tensor] = {}
    stats: dict[str, Tensor] = {}
    for number, batch in enumerate(batches, start=1):
        moved = batch.to(precision.device)
        with team.micro_step(model, last=number == len(batches)):
            with precision.autocast():
                output = model(moved.input_ids, segments=moved.segments, labels=moved.labels)
            weight = batch.num_tokens / tokens
            auxiliary = {name: value * weight for name, value in output.losses.items()}
            objective = output.loss_sum / max(1, totals.targets)
            for value in auxiliary.values():
                objective = objective + value
            precision.backward(objective * team.size if team.size > 1 else objective)  # gradients are averaged
        parts = {"loss_sum": output.loss_sum, **auxiliary, "objective": objective}
        sums = {name: sums.get(name, 0) + value.detach() for name, value in parts.items()}
        stats = output.stats
    team.collect()
    return {"targets": torch.tensor(float(totals.targets), device=precision.device), **team.sum(sums)}, stats
