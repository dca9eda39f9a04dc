"""The steps of a run that ``resume --verify`` takes again: from where, by which plan, and whether they can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from ultrazoo.config import TrainingConfig
from ultrazoo.errors import CheckpointError
from ultrazoo.train.checkpoint import read_config, read_state, verify_checkpoint
from ultrazoo.train.folder import RunFolder
from ultrazoo.train.resume import UNREMARKABLE, changed_fields
from ultrazoo.train.store import CheckpointStore

PLAN = ("max_steps", "num_epochs", "log_every_n_steps")
"""Training fields that a resume may change and that are repeated as they were: when a run ends, and what it records."""
WITHOUT_PART = (UNREMARKABLE - {*PLAN}) | {
    "checkpoint_every_n_steps",
    "max_rolling_checkpoints",
    "num_best_checkpoints",
    "prefer_local_cache",
    "dataloader_workers",
    "num_workers",
}
"""Training fields that no step and no record depends on."""


class Part(NamedTuple):
    """Steps that one process took."""

    end: int
    """The last of them."""
    plan: dict[str, Any]
    """Its values of the fields ``PLAN``; empty if a start of an earlier version did not note them."""


def plan_of(training: TrainingConfig) -> dict[str, Any]:
    """The fields ``PLAN`` of a start, for env.json."""
    return {name: getattr(training, name) for name in PLAN}


def choose(store: CheckpointStore, folder: RunFolder, steps: int | None) -> tuple[Path | None, dict[int, Path]]:
    """The checkpoint to begin at, None for the beginning of the run, and those to compare with, by step."""
    present = store.complete()
    for path in present:
        verify_checkpoint(path)
    numbered = {int(read_state(path)["step"]): path for path in present}
    newest = max(numbered)
    earlier = [step for step in numbered if step < newest and (steps is None or step <= newest - steps)]
    if earlier:
        return numbered[max(earlier)], {step: path for step, path in numbered.items() if step > max(earlier)}
    starts = folder.starts()
    if not starts or starts[0]["step"] != 0 or folder.first_weights():
        raise CheckpointError(
            f"{folder.path}: no checkpoint lies {steps or 1} or more steps before {numbered[newest].name}, and the run "
            "began elsewhere; keep more of them (training.max_rolling_checkpoints), or lower --steps"
        )
    return None, numbered


def parts_of(folder: RunFolder, begun: int, end: int) -> list[Part]:
    """The parts of a stretch, one for each start of the run."""
    starts = _starts(folder, begun, end)
    if not starts:
        return [Part(end, {})]
    ends = [*(one["step"] for one in starts[1:]), end]
    return [Part(stop, one.get("plan", {})) for one, stop in zip(starts, ends, strict=True)]


def require_repeatable(folder: RunFolder, start: Path | None, originals: dict[int, Path], size: int) -> None:
    """Refuse a stretch in which something changed that its steps depend on, or that cannot be had again here.

    Args:
        folder: The run folder.
        start: The checkpoint to begin at; None: the beginning of the run.
        originals: The checkpoints to compare with, by step.
        size: Processes that would take the steps again.

    Raises:
        CheckpointError: Says why.
    """
    last = originals[max(originals)]
    begun = 0 if start is None else read_state(start)["step"]
    stretch = [path for path in (start, *originals.values()) if path is not None]
    states, after = [read_state(path) for path in stretch], read_config(last)
    if after["training"]["max_minutes"] is not None:
        raise CheckpointError(
            f"{last}: training.max_minutes makes the learning rate follow the clock, which cannot be turned back; "
            "only runs of max_steps or num_epochs can be verified"
        )
    processes = states[-1].get("processes", 1)
    starts = _starts(folder, begun, max(originals))
    within = [one for one in starts if one["step"] >= begun]
    if {processes} != {one.get("processes", 1) for one in (*states, *within)}:
        raise CheckpointError(f"{last}: the number of processes changed since {start}; verify a later stretch")
    if processes != size:
        again = f"torchrun --nproc-per-node {processes} -m ultrazoo" if processes > 1 else "ultrazoo"
        raise CheckpointError(
            f"{last}: taken by {processes} process{'es' * (processes > 1)}, which {size} cannot repeat to the bit; run "
            f"{again} resume {folder.path} --verify"
        )
    anew = any(one["step"] == begun for one in starts)  # what the process before did differently plays no part
    changed = {
        name
        for before in map(read_config, originals.values() if anew else stretch)
        for name in changed_fields(before, after)
    }
    changed |= {note.partition(":")[0] for one in starts if one["step"] > begun for note in one.get("changed", ())}
    noted = bool(starts) and starts[0]["step"] <= begun and all("plan" in one for one in starts)
    free = {f"training.{name}" for name in WITHOUT_PART.union(PLAN if noted else ())}
    if changed := changed - free:
        since = "the beginning" if start is None else start.name
        raise CheckpointError(f"{last}: {', '.join(sorted(changed))} changed since {since}; verify a later stretch")
    returns = [state["progress"].get("rollbacks", 0) for state in (states[0], states[-1])]
    if returns[-1] != (0 if start is None else returns[0]):
        raise CheckpointError(f"{last}: the run rolled back on the way; verify a later stretch")


def _starts(folder: RunFolder, begun: int, end: int) -> list[dict[str, Any]]:
    """The starts that a stretch was taken by: the last one before its first step, and those on the way."""
    starts = [one for one in folder.starts() if one["step"] < end]
    before = [one for one in starts if one["step"] <= begun]
    return [*before[-1:], *starts[len(before) :]]
