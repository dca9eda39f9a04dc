"""How far a run has come, and the learning rate that belongs there."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ultrazoo.config import TrainingConfig


def learning_rate_factor(
    position: float, *, shape: str, warmup_ratio: float, decay_ratio: float = 0.2, floor: float = 0.0
) -> float:
    """position / warmup_ratio in the warm-up, then from 1 down to ``floor`` along the shape.

    Args:
        position: Share of the run, 0 to 1; what lies beyond counts as the end.
        shape: ``linear``, ``cosine``, ``wsd`` (1, then linear over the last ``decay_ratio``) or ``constant``.
        warmup_ratio: Share of the run spent warming up.
        decay_ratio: Share of the run that ``wsd`` spends decaying.
        floor: The last factor.
    """
    position = min(max(position, 0.0), 1.0)
    if position < warmup_ratio:
        return position / warmup_ratio
    rest = (position - warmup_ratio) / (1 - warmup_ratio)
    if shape == "constant":
        return 1.0
    if shape == "linear":
        fall = rest
    elif shape == "cosine":
        fall = 0.5 * (1 - math.cos(math.pi * rest))
    else:
        fall = max(0.0, (position - (1 - decay_ratio)) / decay_ratio)
    return 1 - (1 - floor) * fall


@dataclass
class Progress:
    """Where a run stands; kept in every checkpoint."""

    step: int = 0
    tokens: int = 0
    """Real tokens, padding left out."""
    elapsed_seconds: float = 0.0
    """All of the run: steps, validations, checkpoints."""
    train_seconds: float = 0.0
    """Steps alone."""
    wait_seconds: float = 0.0
    """Part of the steps spent waiting for data."""
    skipped_steps: int = 0
    """Updates left out under ``on_nan: skip``."""
    rollbacks: int = 0
    """Returns to a checkpoint under ``on_nan: rollback``."""
    train_loss: float | None = None
    validated_step: int = -1
    validation: dict[str, float] = field(default_factory=dict)

    def return_to(self, earlier: Progress) -> None:
        """Take over the step and the losses of a checkpoint; the counts of work done go on."""
        self.step, self.train_loss = earlier.step, earlier.train_loss
        self.validated_step, self.validation = earlier.validated_step, earlier.validation
        self.rollbacks += 1

    def figures(self) -> dict[str, Any]:
        """What the final table says of it."""
        seconds = self.train_seconds
        return {
            "steps": self.step,
            "tokens": self.tokens,
            "seconds": self.elapsed_seconds,
            "tokens_per_second": self.tokens / seconds if seconds else None,
            "data_wait_share": self.wait_seconds / seconds if seconds else None,
            "train_loss": self.train_loss,
            "skipped_steps": self.skipped_steps,
            "rollbacks": self.rollbacks,
            **{f"validation_{key}": self.validation.get(key) for key in ("loss", "perplexity", "accuracy")},
        }

    @property
    def validation_loss(self) -> float | None:
        """Validation loss of the very weights of this step, if there is one."""
        return self.validation["loss"] if self.validated_step == self.step else None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """When a run ends: whichever limit comes first."""

    training: TrainingConfig
    total_steps: int | None
    """Optimiser steps; None when only the clock or the epochs end the run."""
    max_seconds: float | None
    num_epochs: float | None
    """Set only where the number of steps in an epoch is not known beforehand."""

    def share(self, steps: float, seconds: float, epoch: float) -> float:
        """Largest share of a limit that is used up."""
        used = [0.0]
        if self.total_steps is not None:
            used.append(steps / self.total_steps)
        if self.max_seconds is not None:
            used.append(seconds / self.max_seconds)
        if self.num_epochs is not None:
            used.append(epoch / self.num_epochs)
        return max(used)

    def learning_rate(self, step: int, seconds: float, epoch: float) -> float:
        """Learning rate of the step about to be taken, at its middle: neither the first nor the last one is idle."""
        training = self.training
        factor = learning_rate_factor(
            self.share(step + 0.5, seconds, epoch),
            shape=training.lr_schedule,
            warmup_ratio=training.warmup_ratio,
            decay_ratio=training.decay_ratio,
            floor=training.min_learning_rate_ratio,
        )
        return training.learning_rate * factor


def note_on_batch(training: TrainingConfig, rows_per_epoch: int) -> str:
    """What a step of more rows than the data have means; empty if it has no more."""
    size, parts = training.batch_size, training.gradient_accumulation_steps
    if size * parts <= rows_per_epoch:
        return ""
    factors = f" (batch_size {size:,} x gradient_accumulation_steps {parts:,})" if parts > 1 else ""
    return (
        f"warning: training.batch_size: a step takes {size * parts:,} rows{factors}, but one pass over the data has "
        f"{rows_per_epoch:,}; every step repeats rows; lower {'one of them' if parts > 1 else 'it'}, or add data"
    )


def make_plan(training: TrainingConfig, rows_per_epoch: int | None) -> Plan:
    """Derive the limits of a run: ``max_steps`` and ``max_minutes`` where set, else ``num_epochs``.

    Args:
        training: The training section.
        rows_per_epoch: Rows of the batches in one pass over the data; None when nobody has counted them.
    """
    total, epochs = training.max_steps, None
    if training.max_steps is None and training.max_minutes is None:
        if rows_per_epoch is None:
            epochs = training.num_epochs
        else:
            rows_per_step = training.batch_size * training.gradient_accumulation_steps
            total = max(1, math.ceil(rows_per_epoch * training.num_epochs / rows_per_step))
    seconds = None if training.max_minutes is None else training.max_minutes * 60
    return Plan(training=training, total_steps=total, max_seconds=seconds, num_epochs=epochs)
