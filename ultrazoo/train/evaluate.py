"""Scores a model on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from ultrazoo.errors import NonFiniteError
from ultrazoo.model import IGNORED
from ultrazoo.train.amp import Precision
from ultrazoo.train.team import Team

if TYPE_CHECKING:
    from ultrazoo.data import Batch


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    precision: Precision,
    stopped: Callable[[], bool] = lambda: False,
    team: Team | None = None,
) -> dict[str, float] | None:
    """Return ``loss`` (nats per target), ``perplexity``, top-1 ``accuracy`` and the number of ``targets``.

    Args:
        model: The model; it is left in training mode or not, as it was found.
        batches: Held-out batches with fixed masks.
        precision: Dtype and device to score in.
        stopped: Asked before every batch; True gives the evaluation up.
        team: The processes that share the batches; None: this one alone.

    Returns:
        The figures; None if it was given up or nothing was masked.

    Raises:
        NonFiniteError: The loss is not finite.
    """
    rows, targets, training = [], 0, model.training
    model.eval()
    for batch in batches:
        if stopped():
            break
        moved = batch.to(precision.device)
        with precision.autocast():
            output = model(moved.input_ids, segments=moved.segments, labels=moved.labels)
        wanted = moved.labels[moved.labels != IGNORED]
        targets += wanted.numel()
        rows.append(torch.stack([output.loss_sum.float(), (output.logits.argmax(-1) == wanted).sum().float()]))
    model.train(training)
    if stopped():
        return None
    columns = zip(*torch.stack(rows).tolist(), strict=True) if rows else ((), ())
    loss_sum, correct, seen = (team or Team()).total([*map(math.fsum, columns), targets])
    if not seen:
        return None
    loss, accuracy = loss_sum / seen, correct / seen
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"validation: the loss is {loss:g}, expected a finite number; the steps before were finite, so "
            "training.on_nan does not apply, and no checkpoint is written; lower training.learning_rate or "
            "training.max_grad_norm, or set training.use_amp to false, and continue with --resume auto"
        )
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "accuracy": accuracy, "targets": int(seen)}
