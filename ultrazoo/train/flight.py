"""The flight record of a step whose loss or gradient was not finite: all that is needed to run it again.

    flight/step-000123/
      batch.safetensors     <micro-batch>.input_ids, .segments, .labels, as they came from the data
      model.safetensors     the weights that the step began with: no update was applied from this step on
      record.json           random numbers, step, loss, norm, statistics by block, kernel of each op, versions, machine
      config.yaml           the resolved config
      manifest.json         format_version, and the size and SHA-256 of each file above

A folder is written under a temporary name, flushed and renamed. Nothing in it is ever unpickled.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ultrazoo.config import Config
from ultrazoo.errors import CheckpointError, UltrazooError
from ultrazoo.ops.library import get_kernel_policy
from ultrazoo.revisions import Revisions
from ultrazoo.train.amp import Precision
from ultrazoo.train.checkpoint import CONFIG, MODEL, model_tensors, on_host, read_tensors
from ultrazoo.train.durable import MANIFEST, odd_kind, publish, read_json, remove_leftovers, to_json, verify_folder
from ultrazoo.train.examine import Examination, examine
from ultrazoo.train.formats import StepRecord
from ultrazoo.train.health import Fault
from ultrazoo.train.receipt import kernels_used
from ultrazoo.train.runtime import RandomState, environment
from ultrazoo.train.statistics import weight_statistics

if TYPE_CHECKING:
    from ultrazoo.data import Batch

BATCH, RECORD = "batch.safetensors", "record.json"
FILES = (BATCH, MODEL, RECORD, CONFIG)
NAME = re.compile(r"step-\d+(-\d+)?")
KEPT = 3
"""Flight records that a run folder keeps, and that one process writes before the one of its stop."""


@dataclass
class Moment:
    """What a step began with, and what came of it."""

    step: int
    batches: Sequence[Batch]
    random: RandomState
    learning_rate: float
    loss: Tensor = field(default_factory=lambda: torch.tensor(math.nan))
    norm: Tensor = field(default_factory=lambda: torch.tensor(math.nan))


class FlightRecorder:
    """Remembers the steps since the last look, a few integers a token, and writes the first bad one down.

    Args:
        folder: Where records go; made with the first.
        config: The whole configuration.
        device: The device that trains.
        revisions: Rules of the run.
    """

    def __init__(self, folder: Path, config: Config, device: torch.device, revisions: Revisions) -> None:
        self.folder, self.config, self.device, self.revisions = folder, config, device, revisions
        self._moments: deque[Moment] = deque()
        self._written = 0

    def begin(self, step: int, batches: Sequence[Batch], learning_rate: float) -> Moment:
        """Remember what a step is about to use."""
        self._moments.append(Moment(step, batches, RandomState(self.device), learning_rate))
        return self._moments[-1]

    def forget(self) -> None:
        """Nothing was wrong so far."""
        self._moments.clear()

    def moment(self, step: int) -> Moment:
        """What is remembered of a step since the last look."""
        return next(moment for moment in self._moments if moment.step == step)

    def write(
        self, fault: Fault, model: nn.Module, precision: Precision, *, stops: bool
    ) -> tuple[Path | None, Examination | None]:
        """Run the first bad step again under watch, and write its record; the random streams stay as they are.

        Args:
            fault: What was found; the model must still have the weights of its first step.
            model: The model.
            precision: As in training.
            stops: The run ends here: it is recorded however many were before.

        Returns:
            The record, and what the examination found; None and None when enough are kept.

        Raises:
            CheckpointError: The file system refused.
        """
        moment = self.moment(fault.step)
        self.forget()
        if self._written >= KEPT and not stops:
            return None, None
        self._written += 1
        now = RandomState(self.device)
        moment.random.restore()
        try:
            exact = self.config.training.exact_balance_loss
            seen = examine(model, moment.batches, precision, exact_balance=exact)
        finally:
            now.restore()
        path = self._free_folder(fault.step)
        tensors = {
            f"{index}.{name}": getattr(batch, name).cpu().contiguous()
            for index, batch in enumerate(moment.batches)
            for name in ("input_ids", "segments", "labels")
        }
        record = self._describe(fault, moment, model, precision, seen)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self.folder}: cannot be made: {error}") from error
        if kind := odd_kind(self.folder, folder=True):
            raise CheckpointError(f"{self.folder}: is {kind}, expected a folder of the run; remove it")
        publish(
            path,
            {
                BATCH: lambda file: save_file(tensors, file),
                MODEL: lambda file: save_file(on_host(model_tensors(model)), file),
                RECORD: lambda file: file.write_text(to_json(record), encoding="utf-8"),
                CONFIG: lambda file: file.write_text(self.config.to_yaml(), encoding="utf-8"),
            },
        )
        self._tidy(path)
        return path, seen

    def _describe(
        self, fault: Fault, moment: Moment, model: nn.Module, precision: Precision, seen: Examination
    ) -> dict[str, Any]:
        parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        return {
            **asdict(fault),
            "loss": _text(moment.loss),
            "gradient_norm": _text(moment.norm),
            "learning_rate": moment.learning_rate,
            "num_tokens": [batch.num_tokens for batch in moment.batches],
            "dtype": str(precision.dtype or torch.float32).removeprefix("torch."),
            "loss_scale": precision.scaler.get_scale() if precision.scaled else 1.0,
            "repeated": {
                "loss": _text(seen.loss),
                "gradient_norm": _text(seen.norm),
                "origin": str(seen.origin) if seen.origin else None,
                "overflow": str(seen.overflow) if seen.overflow else None,
            },
            "weights": _texts(weight_statistics(parameters)),
            "gradients": _texts(seen.gradients),
            "activations": _texts(seen.activations),
            "revisions": dict(self.revisions),
            "kernel_policy": get_kernel_policy(),
            "kernels": kernels_used(self.config, self.device),
            "environment": environment(self.device),
            "random": moment.random.to_json(),
        }

    def _free_folder(self, step: int) -> Path:
        path, number = self.folder / f"step-{step:06d}", 1
        while os.path.lexists(path):
            number += 1
            path = self.folder / f"step-{step:06d}-{number}"
        return path

    def _tidy(self, newest: Path) -> None:
        remove_leftovers(self.folder)
        own = (path for path in self.folder.iterdir() if NAME.fullmatch(path.name) and not path.is_symlink())
        others = sorted(path for path in own if path != newest and (path / MANIFEST).is_file())
        for path in others[: -(KEPT - 1)]:
            shutil.rmtree(path)


@dataclass(frozen=True, kw_only=True)
class Flight:
    """A flight record, read back."""

    record: dict[str, Any]
    batches: list[dict[str, Tensor]]


def read_flight(folder: Path) -> Flight:
    """Read a flight record; its weights stay in the file.

    Raises:
        UltrazooError: There is none, or it is damaged.
    """
    if not (folder / RECORD).is_file():
        raise UltrazooError(
            f"{folder}: holds no flight record; expected a folder such as runs/embbert/flight/step-000123"
        )
    verify_folder(folder, FILES)
    record = read_json(folder / RECORD, StepRecord)
    batches: list[dict[str, Tensor]] = [{} for _ in record["num_tokens"]]
    for name, tensor in read_tensors(folder / BATCH).items():
        index, _, key = name.partition(".")
        if not index.isdecimal() or int(index) >= len(batches):
            raise CheckpointError(f"{folder / BATCH}: damaged: got tensor {name!r}, expected 0.input_ids and the like")
        batches[int(index)][key] = tensor
    return Flight(record=record, batches=batches)


def _text(value: Tensor | float) -> str:
    """A number as text, since JSON has no NaN."""
    return f"{float(value):g}"


def _texts(statistics: dict[str, dict[str, float]]) -> dict[str, dict[str, str]]:
    return {block: {name: _text(value) for name, value in entries.items()} for block, entries in statistics.items()}
