"""What many processes must do alike: stop at the same step, and see the same checkpoints."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ultrazoo import output
from ultrazoo.config import Config
from ultrazoo.model import build_model
from ultrazoo.revisions import Revisions
from ultrazoo.train.amp import Precision
from ultrazoo.train.checkpoint import Snapshot
from ultrazoo.train.examine import Examination
from ultrazoo.train.flight import FlightRecorder
from ultrazoo.train.health import Fault
from ultrazoo.train.runtime import RandomState
from ultrazoo.train.signals import STOPS, SignalGuard
from ultrazoo.train.store import CheckpointStore
from ultrazoo.train.team import Team

ECHO_SECONDS = 5.0
"""Ctrl-C reaches a process twice: from the terminal and from torchrun. Within so many seconds that is one request."""


class TeamGuard(SignalGuard):
    """Requests that reach any process become requests to all of them, at the next ``poll``.

    Before ``begin`` a stop ends the process as if there were no guard: it may wait for another one in a call that
    returns to no handler.

    Args:
        team: The processes.
    """

    early = ()
    echo_seconds = ECHO_SECONDS

    def __init__(self, team: Team) -> None:
        super().__init__(starting=True)
        self._team = team
        self._asked: signal.Signals | None = None
        self._wanted = False

    def poll(self) -> bool:
        flags = [*(self._asked == number for number in STOPS), self._wanted]
        self._wanted = False
        *stops, wanted = self._team.agree([int(flag) for flag in flags])
        self.stop = next((number for number, asked in zip(STOPS, stops, strict=True) if asked), self.stop)
        self.checkpoint = self.checkpoint or bool(wanted)
        return self.stop is not None

    def _request(self, asked: signal.Signals) -> None:
        if self._asked is None:
            self._asked = asked
            if self._team.leads:
                output.notify(f"\n{asked.name}: finishing the step, then a checkpoint\n")

    def _request_checkpoint(self) -> None:
        self._wanted = True


class TeamStore(CheckpointStore):
    """The first process reads and writes the folder of checkpoints; the others learn from it what came of it.

    Args:
        store: Checkpoints on a file system that every machine of the job sees.
        team: The processes.
    """

    def __init__(self, store: CheckpointStore, team: Team) -> None:
        super().__init__(store.root, store.max_rolling, store.num_best)
        self._store, self._team = store, team

    def would_be_best(self, validation_loss: float) -> bool:
        return self._team.leader_says(lambda: self._store.would_be_best(validation_loss))

    def save(self, step: int, snapshot: Snapshot) -> Path:
        return self._team.leader_says(lambda: self._store.save(step, snapshot))

    def newest_whole(self, warn: Callable[[str], None]) -> Path | None:
        return self._team.leader_says(lambda: self._store.newest_whole(warn))


class TeamFlights(FlightRecorder):
    """Collects the micro-batches of all processes, and examines them in the first one, on a whole copy of the model.

    Dropout is drawn there in another order than it was: the record of a fault that depends on it may not reproduce it.

    Args:
        folder: Where records go; made with the first.
        config: The whole configuration.
        device: The device that trains.
        revisions: Rules of the run.
        team: The processes.
    """

    def __init__(self, folder: Path, config: Config, device: torch.device, revisions: Revisions, team: Team) -> None:
        super().__init__(folder, config, device, revisions)
        self._team = team

    def write(
        self, fault: Fault, model: nn.Module, precision: Precision, *, stops: bool
    ) -> tuple[Path | None, Examination | None]:
        moment = self.moment(fault.step)
        shares = self._team.gather([batch.to("cpu") for batch in moment.batches])
        weights = self._team.model_tensors(model)
        try:
            if not self._team.leads:
                self.forget()
                return None, None
            moment.batches = [batch for share in shares for batch in share]
            now = RandomState(self.device)
            copy = build_model(self.config.model).to(self.device)
            now.restore()
            copy.load_state_dict(weights, strict=False)  # what is missing is shared with what is there
            return super().write(fault, copy, precision, stops=stops)
        finally:
            self._team.barrier()


def flight_recorder(
    team: Team, folder: Path, config: Config, device: torch.device, revisions: Revisions
) -> FlightRecorder:
    """The recorder for one process or many."""
    if team.size == 1:
        return FlightRecorder(folder, config, device, revisions)
    return TeamFlights(folder, config, device, revisions, team)
