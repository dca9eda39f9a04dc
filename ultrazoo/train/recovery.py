"""What follows a step whose loss or gradient is not finite: a flight record, then stop, skip or roll back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from ultrazoo.config import TrainingConfig
from ultrazoo.errors import CheckpointError, NonFiniteError
from ultrazoo.train.amp import Precision
from ultrazoo.train.flight import FlightRecorder
from ultrazoo.train.health import Fault, FiniteGuard
from ultrazoo.train.schedule import Progress
from ultrazoo.train.store import CheckpointStore

Say = Callable[[str], None]


class Recovery:
    """Acts by ``on_nan``, and ends a run that does not recover.

    Args:
        training: The training section.
        guard: Finds the faults.
        flights: Remembers what the steps began with.
        store: Checkpoints to return to.
        say: Takes lines for the user.
    """

    def __init__(
        self, training: TrainingConfig, guard: FiniteGuard, flights: FlightRecorder, store: CheckpointStore, say: Say
    ) -> None:
        self.training, self.guard, self.flights, self.store, self.say = training, guard, flights, store, say
        self.returns = 0
        """Rollbacks since the last checkpoint."""

    def look(
        self,
        progress: Progress,
        model: nn.Module,
        precision: Precision,
        last_checkpoint: Path | None,
        report: Callable[[dict[str, Any]], None],
    ) -> Path | None:
        """Look for steps that were not finite, and act; return the checkpoint to go back to, if any.

        Args:
            progress: Where the run stands; updates that are left out are counted there.
            model: The model.
            precision: As in training.
            last_checkpoint: The newest checkpoint that this process wrote or started from.
            report: Takes a record for the metrics.

        Raises:
            NonFiniteError: The run must stop: ``on_nan`` says so, it does not recover, or there is no checkpoint.
        """
        fault = self.guard.look(progress.step)
        if fault is None:
            self.flights.forget()
            return None
        policy, moment = self.training.on_nan, self.flights.moment(fault.step)
        found = "" if fault.held == 1 else f" (found at the check of step {fault.found_at})"
        text = f"step {fault.step}: loss {moment.loss.item():g}, gradient norm {moment.norm.item():g}{found}"
        stop = self._why_stop(fault, last_checkpoint)
        cause = self._record(fault, model, precision, stops=bool(stop))
        entry = {"first": fault.step, "bad_steps": fault.bad, "held_updates": fault.held}
        report({"step": fault.found_at, "not_finite": {**entry, "action": "stop" if stop else policy}})
        if stop:
            raise NonFiniteError(
                f"{text}, expected finite numbers{stop}; no update was applied from there on, so the weights are those "
                f"of step {fault.step - 1}; {cause}last good checkpoint: {last_checkpoint or 'none'}; "
                "lower training.learning_rate or training.max_grad_norm, or set training.use_amp to false"
            )
        if policy == "skip":
            progress.skipped_steps += fault.held
            steps = f"step {fault.step}" if fault.held == 1 else f"steps {fault.step} to {fault.found_at}"
            self.say(f"warning: {text}; {cause}the updates of {steps} are left out")
            return None
        self.returns += 1
        self.guard.forgive()
        target = self.store.newest_whole(self.say) or last_checkpoint
        tries = f"{self.returns} of {self.training.nan_limit}"
        self.say(f"warning: {text}; {cause}going back to {target}, on with later data ({tries})")
        return target

    def _why_stop(self, fault: Fault, last_checkpoint: Path | None) -> str:
        """The reason to stop, as the continuation of a sentence; empty to go on."""
        policy, limit = self.training.on_nan, self.training.nan_limit
        if policy == "stop":
            return " (training.on_nan is stop)"
        if policy == "skip":
            return f" ({fault.streak} steps in a row; training.nan_limit is {limit})" if fault.streak >= limit else ""
        if last_checkpoint is None:
            return " (training.on_nan is rollback, but no checkpoint is written yet)"
        return f" again, after {limit} rollbacks to it (training.nan_limit)" if self.returns >= limit else ""

    def _record(self, fault: Fault, model: nn.Module, precision: Precision, *, stops: bool) -> str:
        """Write the flight record; return what it says, for a message.

        A full disk, or memory too small to run the step under watch, must not hide the fault itself.
        """
        try:
            path, seen = self.flights.write(fault, model, precision, stops=stops)
        except (CheckpointError, RuntimeError) as error:
            return f"no flight record: {error}; "
        if path is None or seen is None:
            return ""
        origin = f"it arose in {seen.origin}; " if seen.origin else ""
        return f"{origin}flight record: {path} (ultrazoo replay {path}); "
