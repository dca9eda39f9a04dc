"""Forward and backward passes of one optimiser step: the same for the trainer and for whoever repeats its step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ultrazoo.model import IGNORED
from ultrazoo.train.amp import Precision
from ultrazoo.train.runtime import RandomState
from ultrazoo.train.team import Team, Totals

if TYPE_CHECKING:
    from ultrazoo.data import Batch


def accumulate(
    model: nn.Module,
    batches: Sequence[Batch],
    precision: Precision,
    team: Team | None = None,
    totals: Totals | None = None,
    *,
    exact_balance: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Leave the gradient of the mean loss over all targets, plus the auxiliary losses, in the parameters.

    Args:
        model: The model.
        batches: Micro-batches; auxiliary losses are weighted by their real tokens, so means over tokens are exact.
        precision: Device and dtype to run in.
        team: The processes that share the step; None: this one alone.
        totals: What the step holds over all of them; None: counted here.
        exact_balance: Make losses that are products of two means over tokens, such as the balance loss of experts,
            those of the whole step too, by a pass over the micro-batches without gradients that draws the same dropout.

    Returns:
        Detached scalars (``objective``, ``loss_sum``, ``targets`` and each auxiliary loss), and the statistics of the
        last micro-batch.
    """
    team = team or Team()
    totals = totals or team.totals(batches)
    tokens = max(1, totals.tokens)
    sums: dict[str, Tensor] = {}
    stats: dict[str, Tensor] = {}
    shares: dict[str, Tensor] = {}
    states: list[RandomState] = []
    for number, batch in enumerate(batches, start=1):
        moved = batch.to(precision.device)
        with team.micro_step(model, last=number == len(batches)):
            if states:
                states[number - 2].restore()
            with precision.autocast():
                output = model(moved.input_ids, segments=moved.segments, labels=moved.labels)
            if exact_balance and number == 1 < len(batches):
                shares, states = _look_ahead(model, output.factors, batches, precision, team, tokens)
            losses = output.losses | {
                name: (share * output.factors[name][:, 1]).sum(1).mean() for name, share in shares.items()
            }
            weight = batch.num_tokens / tokens
            auxiliary = {name: value * weight for name, value in losses.items()}
            objective = output.loss_sum / max(1, totals.targets)
            for value in auxiliary.values():
                objective = objective + value
            precision.backward(objective * team.size if team.size > 1 else objective)  # gradients are averaged
        parts = {"loss_sum": output.loss_sum, **auxiliary, "objective": objective}
        sums = {name: sums.get(name, 0) + value.detach() for name, value in parts.items()}
        stats = output.stats
    team.collect()
    return {"targets": torch.tensor(float(totals.targets), device=precision.device), **team.sum(sums)}, stats


@torch.no_grad()
def _look_ahead(
    model: nn.Module,
    first: dict[str, Tensor],
    batches: Sequence[Batch],
    precision: Precision,
    team: Team,
    tokens: int,
) -> tuple[dict[str, Tensor], list[RandomState]]:
    """Find the first factor of each product over the whole step, before any micro-batch needs it.

    Args:
        model: The model.
        first: Factors of the first micro-batch; empty if the model has no such loss, and nothing is run.
        batches: All micro-batches.
        precision: Device and dtype to run in.
        team: The processes that share the step.
        tokens: Real tokens of the step.

    Returns:
        Loss -> (calls, K), and the random numbers that each later micro-batch begins with.
    """
    states: list[RandomState] = []
    shares = {name: factors[:, 0] * (batches[0].num_tokens / tokens) for name, factors in first.items()}
    for batch in batches[1:] if first else ():
        states.append(RandomState(precision.device))
        moved = batch.to(precision.device)
        with precision.autocast():  # without a target the head has nothing to do
            output = model(moved.input_ids, segments=moved.segments, labels=torch.full_like(moved.labels, IGNORED))
        weight = batch.num_tokens / tokens
        shares = {name: share + output.factors[name][:, 0] * weight for name, share in shares.items()}
    return {name: team.sum({name: share})[name] for name, share in shares.items()}, states
