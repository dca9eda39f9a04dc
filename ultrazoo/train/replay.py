"""Runs a recorded step again, as it was or on another backend, dtype or device, and says where it went wrong."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ultrazoo.arguments import file_path
from ultrazoo.config import config_from_dict
from ultrazoo.data.batch import Batch
from ultrazoo.errors import ConfigError
from ultrazoo.model import build_model
from ultrazoo.ops.library import kernel_policy
from ultrazoo.revisions import saved_revisions
from ultrazoo.train.amp import Precision
from ultrazoo.train.checkpoint import load_model, read_config
from ultrazoo.train.examine import Examination, examine
from ultrazoo.train.flight import read_flight
from ultrazoo.train.receipt import kernels_used
from ultrazoo.train.runtime import prepared, set_rng_state

DTYPES = ("float32", "bfloat16", "float16", "float64")
POLICIES = ("auto", "compiled", "reference")


class Way(NamedTuple):
    """How a step is computed."""

    kernels: str
    """``compiled``, ``reference``, ``some compiled``; ``no`` for a model without ops of its own."""
    dtype: str
    device: str

    def __str__(self) -> str:
        return f"{self.kernels} kernels, {self.dtype}, {self.device}"


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A recorded step that was run again."""

    step: int
    loss: str
    """As recorded, as text; so is the norm."""
    norm: str
    recorded: Way
    runs: Way
    seen: Examination

    @property
    def explained(self) -> bool:
        """True if the fault came again, or another way to compute avoids it."""
        return not self.seen.finite or self.runs != self.recorded

    @property
    def verdict(self) -> str:
        """What follows from the replay."""
        changed = [name for name, old, new in zip(Way._fields, self.recorded, self.runs, strict=True) if old != new]
        if not self.seen.finite:
            result = f"not finite ({self.runs}): loss {self.seen.loss:g}, gradient norm {self.seen.norm:g}"
            if self.seen.origin is None:
                result += "; every value of the gradient is finite, but the sum of their squares is not"
            if changed:
                return f"{result}; so {' and '.join(changed)} make no difference: look at the batch and the weights"
            return f"{result}; reproduced"
        result = f"finite ({self.runs}): loss {self.seen.loss:g}, gradient norm {self.seen.norm:g}"
        if not changed:
            return (
                f"{result}; not reproduced: neither the batch nor the weights nor the random numbers are the cause; "
                "suspect the machine, or a kernel that is not deterministic"
            )
        causes = [
            f"{self.recorded.kernels} kernels" if name == "kernels" else getattr(self.recorded, name)
            for name in changed
        ]
        hint = "; change one of them at a time to tell which" if len(changed) > 1 else ""
        return f"{result}; so the fault comes with {', '.join(causes)}{hint}"


def replay(
    folder: str | Path, *, kernels: str | None = None, dtype: str | None = None, device: str | None = None
) -> Replay:
    """Run the step of a flight record again, forwards and backwards, and follow what is not finite to its origin.

    Args:
        folder: The flight record.
        kernels: ``auto``, ``compiled`` or ``reference``; None: as recorded (in float64 always the references).
        dtype: ``float32``, ``float64``, or mixed precision in ``bfloat16`` or ``float16``; None: as recorded.
        device: A device; None: as recorded if it is there, else the CPU.

    Raises:
        UltrazooError: The record is missing or damaged, or made under rules that this version cannot follow.
        ConfigError: An argument or the record's config cannot be used here.
        KernelUnavailableError: ``compiled`` kernels are asked for and there are none.
    """
    for name, value, known in (("--kernels", kernels, POLICIES), ("--dtype", dtype, DTYPES)):
        if value is not None and value not in known:
            raise ConfigError(f"{name}: got {value!r}, expected one of {', '.join(known)}")
    folder = file_path("folder", folder)
    flight = read_flight(folder)
    record, config = flight.record, config_from_dict(read_config(folder), str(folder))
    saved_revisions(folder, record.get("revisions", {}), config.to_dict())
    used = _in_use(record["kernel_policy"], record["kernels"])
    recorded = Way(used, record["dtype"], record["environment"]["device"])
    wide = (dtype or recorded.dtype) == "float64"
    policy = kernels or ("reference" if wide else record["kernel_policy"])
    where = (recorded.device if _is_here(recorded.device) else "cpu") if device is None else device
    threads = record["environment"]["num_threads"]
    training = config.training.model_copy(update={"device": where, "kernels": "auto", "num_threads": threads})
    with prepared(training) as place, kernel_policy(policy):  # type: ignore[arg-type]
        used = _in_use("reference" if wide else policy, kernels_used(config, place))
        runs = Way(used, dtype or recorded.dtype, str(place))
        model = build_model(config.model)
        load_model(folder, model)
        model = model.to(place, torch.float64 if wide else None)
        precision = Precision(place, None if runs.dtype in ("float32", "float64") else getattr(torch, runs.dtype))
        if precision.scaled:
            precision.scaler = torch.amp.GradScaler(place.type, init_scale=record["loss_scale"])
        batches = [
            Batch(**tensors, num_tokens=count)
            for tensors, count in zip(flight.batches, record["num_tokens"], strict=True)
        ]
        set_rng_state(record["random"], place)
        seen = examine(model.train(), batches, precision, exact_balance=training.exact_balance_loss)
    return Replay(
        step=record["step"],
        loss=record["loss"],
        norm=record["gradient_norm"],
        recorded=recorded,
        runs=runs,
        seen=seen,
    )


def _in_use(policy: str, statuses: list[dict[str, Any]]) -> str:
    """What a kernel policy comes to, given which ops have a kernel."""
    if not statuses:
        return "no"
    compiled = [status["compiled"] for status in statuses]
    if policy == "reference" or not any(compiled):
        return "reference"
    return "compiled" if all(compiled) else "some compiled"


def _is_here(device: str) -> bool:
    kind, _, index = device.partition(":")
    if kind == "cuda":
        return int(index or 0) < torch.cuda.device_count()
    return kind == "cpu" or torch.backends.mps.is_available()
