"""Where a run continues from, and whether that checkpoint belongs to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ultrazoo.config import Config, ModelConfig, TrainingConfig
from ultrazoo.errors import CheckpointError, ConfigError
from ultrazoo.revisions import saved_revisions
from ultrazoo.train.checkpoint import (
    OPTIMIZER,
    STATE,
    TOKENIZER,
    read_config,
    read_state,
    read_tensors,
    verify_checkpoint,
    verify_weights,
)
from ultrazoo.train.durable import MANIFEST, sha256
from ultrazoo.train.store import CheckpointStore, step_of

SHAPELESS = {"dropout", "router_aux_loss_coef", "router_z_loss_coef", "initializer_range"}
"""Fields of the model section that may change between two parts of a run."""
UNREMARKABLE = {"output_dir", "report_to", "log_every_n_steps"}
"""Training fields whose change needs no line."""
EXACT = ("step", "progress", "window", "data", "rng", "scaler", "num_threads")
RANDOM = ("python", "numpy", "torch")


def find_checkpoint(resume: str | None, store: CheckpointStore, say: Callable[[str], None]) -> Path | None:
    """Return the checkpoint to continue from, verified; None to start anew.

    Args:
        resume: None, ``auto``, or the path of a checkpoint or of a run folder.
        store: Checkpoints of the run folder.
        say: Takes lines for the user.

    Raises:
        ConfigError: The folder has checkpoints that a new run, or one that goes on from elsewhere, would mix with.
        CheckpointError: The checkpoint is missing or damaged, or the folder has newer ones.
    """
    if resume is None:
        _require_empty(store)
        return None
    if resume == "auto":
        newest = store.newest_whole(say)
        if newest is None:
            say(f"resume: no checkpoint in {store.root}; starting from the beginning")
        else:
            _require_exact(newest)
        return newest
    path = _named(resume)
    _require_kinship(path, store)
    try:
        verify_checkpoint(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_weights_hint(path)}") from error
    _require_exact(path)
    step = read_state(path)["step"]
    newer = [other.name for other in store.complete() if step_of(other) > step]
    if newer:
        raise CheckpointError(
            f"--resume {resume}: {store.root.parent} already goes on to {newer[-1]}, which this run would write over; "
            "continue with --resume auto, or give the new branch its own --output-dir"
        )
    return path


def find_weights(resume: str | None, store: CheckpointStore) -> Path:
    """Return the checkpoint whose weights alone a new run begins with; they are verified, the rest may be lost.

    Args:
        resume: Path of a checkpoint or of a run folder.
        store: Checkpoints of the new run's folder, where none may be.

    Raises:
        ConfigError: No path is given, or the folder already has checkpoints.
        CheckpointError: There is no checkpoint, or its weights, config or tokenizer are damaged.
    """
    if resume in (None, "auto"):
        raise ConfigError(
            "--weights-only: begins a new run, expected --resume PATH with the checkpoint that has the weights, and "
            "--output-dir for the new run"
        )
    _require_empty(store)
    path = _named(str(resume))
    verify_weights(path)
    return path


def check_weights(folder: Path, config: Config, *, tokenizer_sha256: str) -> None:
    """Compare the model and tokenizer of a checkpoint with those of a run that begins with its weights.

    Raises:
        CheckpointError: Lists every difference.
    """
    problems, _ = _compare_models(folder, config)
    if (saved := sha256(folder / TOKENIZER)) != tokenizer_sha256:
        problems.append(f"tokenizer_sha256: checkpoint {saved!r}, this run {tokenizer_sha256!r}")
    _refuse(folder, problems)


def _require_empty(store: CheckpointStore) -> None:
    if present := store.folders():
        raise ConfigError(
            f"training.output_dir: {store.root.parent} already holds checkpoints (newest {present[-1].name}); "
            "continue with --resume auto, or start anew with --output-dir"
        )


def _require_kinship(path: Path, store: CheckpointStore) -> None:
    """Refuse to mix a run with the checkpoints of another; a copy of a run's own checkpoint may come back to it."""
    if path.resolve().parent == store.root.resolve():
        return
    given = _descent(path)
    others = [other.name for other in store.complete() if _descent(other) not in (None, given)]
    if others:
        raise ConfigError(
            f"--resume {path}: {store.root.parent} has checkpoints of another run ({', '.join(others)}), which this "
            "one would mix with; give it its own --output-dir"
        )


def _descent(path: Path) -> tuple[Any, ...] | None:
    """What a checkpoint has in common with the others of its run alone; None if it cannot be read."""
    try:
        state = read_state(path)
        if "run" in state:
            return (state["run"],)
        return (state.get("data_fingerprint"), state.get("tokenizer_sha256"), read_config(path)["training"].get("seed"))
    except (CheckpointError, KeyError):
        return None


def _named(resume: str) -> Path:
    """The checkpoint that a path means: itself, or the newest of a run folder."""
    path = Path(resume)
    if (path / MANIFEST).is_file():
        return path
    inside = path if path.name == "checkpoints" else path / "checkpoints"
    present = CheckpointStore(inside, 0, 0).complete()
    if not present:
        raise CheckpointError(
            f"--resume {resume}: no checkpoint there; expected 'auto', a run folder, or a folder such as "
            "runs/embbert/checkpoints/step-000500"
        )
    return present[-1]


def _weights_hint(path: Path) -> str:
    """What can still be done with a damaged checkpoint; empty when its weights are lost too."""
    try:
        verify_weights(path)
    except CheckpointError:
        return ""
    return "; its weights are whole: --weights-only begins a new run with them"


def _require_exact(path: Path) -> None:
    """Refuse to continue a run to the bit without all of its state.

    Raises:
        CheckpointError: Names what is missing.
    """
    state = read_state(path)
    missing = [f"{STATE}: {name}" for name in EXACT if name not in state]
    if "rng" in state:
        missing += [f"{STATE}: rng.{name}" for name in RANDOM if name not in state["rng"]]
    if state.get("step", 0) > 0 and not read_tensors(path / OPTIMIZER):
        missing.append(f"{OPTIMIZER}: every tensor")
    if missing:
        raise CheckpointError(
            f"{path}: lacks {', '.join(missing)}; without these the run would not go on as it was; use another "
            "checkpoint, or begin a new run with the weights alone: --weights-only"
        )


def check_match(folder: Path, config: Config, *, tokenizer_sha256: str, data_fingerprint: str) -> list[str]:
    """Compare a checkpoint with the run that wants to continue it, key by key.

    Returns:
        Lines that name harmless changes.

    Raises:
        CheckpointError: Lists every difference in architecture, vocabulary, tokenizer or data.
    """
    saved, state = read_config(folder), read_state(folder)
    problems, notes = _compare_models(folder, config)
    now = config.to_dict()
    for key, old, new in _differences(saved.get("training", {}), now["training"], _defaults(TrainingConfig)):
        if key not in UNREMARKABLE:
            notes.append(f"training.{key}: checkpoint {old!r}, this run {new!r}")
    for key, new in (("tokenizer_sha256", tokenizer_sha256), ("data_fingerprint", data_fingerprint)):
        if state.get(key) != new:
            problems.append(f"{key}: checkpoint {state.get(key)!r}, this run {new!r}")
    _refuse(folder, problems)
    return notes


def changed_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return dotted names of the model and training fields that differ between the configs of two checkpoints."""
    sections = {"model": _defaults(ModelConfig), "training": _defaults(TrainingConfig)}
    return [
        f"{section}.{key}"
        for section, defaults in sections.items()
        for key, _, _ in _differences(old[section], new[section], defaults)
    ]


def revisions_of(folder: Path) -> dict[str, int]:
    """Return the revisions of the rules by which a run continues from a checkpoint.

    Raises:
        CheckpointError: This version cannot follow one of them.
    """
    saved = read_config(folder)
    config = {
        "model": _defaults(ModelConfig) | saved.get("model", {}),
        "training": _defaults(TrainingConfig) | saved.get("training", {}),
    }
    return saved_revisions(folder, read_state(folder).get("revisions", {}), config)


def _compare_models(folder: Path, config: Config) -> tuple[list[str], list[str]]:
    """Differences that the weights do not survive, and harmless ones."""
    problems: list[str] = []
    notes: list[str] = []
    saved, now = read_config(folder), config.to_dict()
    for key, old, new in _differences(saved.get("model", {}), now["model"], _defaults(ModelConfig)):
        line = f"model.{key}: checkpoint {old!r}, this run {new!r}"
        (notes if key in SHAPELESS else problems).append(line)
    before, after = saved.get("plugins", {}), now["plugins"]
    for name in sorted(before.keys() & after.keys()):
        if before[name] != after[name]:
            notes.append(f"plugins.{name}: checkpoint {before[name]!r}, this run {after[name]!r}")
    return problems, notes


def _refuse(folder: Path, problems: list[str]) -> None:
    if problems:
        lines = "\n".join(f"  {line}" for line in problems)
        raise CheckpointError(
            f"{folder}: made for another run:\n{lines}\n  train with the checkpoint's own config.yaml and data, "
            "or start anew with --output-dir"
        )


def _defaults(section: type[ModelConfig] | type[TrainingConfig]) -> dict[str, Any]:
    values = {name: field.get_default(call_default_factory=True) for name, field in section.model_fields.items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _differences(
    old: Mapping[str, Any], new: Mapping[str, Any], defaults: Mapping[str, Any]
) -> list[tuple[str, Any, Any]]:
    """Keys whose values differ; a key that one side does not know has its default there."""
    keys = [*new, *(key for key in old if key not in new)]
    pairs = [(key, old.get(key, defaults.get(key)), new.get(key, defaults.get(key))) for key in keys]
    return [(key, before, after) for key, before, after in pairs if before != after]
