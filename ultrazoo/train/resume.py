"""Where a run continues from, and whether that checkpoint belongs to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ultrazoo.config import Config, ModelConfig, TrainingConfig
from ultrazoo.errors import CheckpointError, ConfigError
from ultrazoo.train.checkpoint import MANIFEST, read_config, read_state, verify_checkpoint
from ultrazoo.train.store import CheckpointStore

SHAPELESS = {"dropout", "router_aux_loss_coef", "router_z_loss_coef", "initializer_range"}
"""Fields of the model section that may change between two parts of a run."""
UNREMARKABLE = {"output_dir", "report_to", "log_every_n_steps"}
"""Training fields whose change needs no line."""


def find_checkpoint(resume: str | None, store: CheckpointStore, say: Callable[[str], None]) -> Path | None:
    """Return the checkpoint to continue from, verified; None to start anew.

    Args:
        resume: None, ``auto``, or the path of a checkpoint or of a run folder.
        store: Checkpoints of the run folder.
        say: Takes lines for the user.

    Raises:
        ConfigError: ``resume`` is None, and the folder has checkpoints that a new run would mix with.
        CheckpointError: The checkpoint is missing or damaged, or the folder has newer ones.
    """
    if resume is None:
        present = store.complete()
        if present:
            raise ConfigError(
                f"training.output_dir: {store.root.parent} already holds checkpoints (newest {present[-1].name}); "
                "continue with --resume auto, or start anew with --output-dir"
            )
        return None
    if resume == "auto":
        newest = store.newest_whole(say)
        if newest is None:
            say(f"resume: no checkpoint in {store.root}; starting from the beginning")
        return newest
    path = Path(resume)
    if not (path / MANIFEST).is_file():
        inside = path if path.name == "checkpoints" else path / "checkpoints"
        present = CheckpointStore(inside, 0, 0).complete()
        if not present:
            raise CheckpointError(
                f"--resume {resume}: no checkpoint there; expected 'auto', a run folder, or a folder such as "
                "runs/embbert/checkpoints/step-000500"
            )
        path = present[-1]
    verify_checkpoint(path)
    step = read_state(path)["step"]
    newer = [other.name for other in store.complete() if read_state(other)["step"] > step]
    if newer:
        raise CheckpointError(
            f"--resume {resume}: {store.root.parent} already goes on to {newer[-1]}, which this run would write over; "
            "continue with --resume auto, or give the new branch its own --output-dir"
        )
    return path


def check_match(folder: Path, config: Config, *, tokenizer_sha256: str, data_fingerprint: str) -> list[str]:
    """Compare a checkpoint with the run that wants to continue it, key by key.

    Returns:
        Lines that name harmless changes.

    Raises:
        CheckpointError: Lists every difference in architecture, vocabulary, tokenizer or data.
    """
    saved, state = read_config(folder), read_state(folder)
    problems: list[str] = []
    notes: list[str] = []
    now = config.to_dict()
    for key, old, new in _differences(saved.get("model", {}), now["model"], _defaults(ModelConfig)):
        line = f"model.{key}: checkpoint {old!r}, this run {new!r}"
        (notes if key in SHAPELESS else problems).append(line)
    for key, old, new in _differences(saved.get("training", {}), now["training"], _defaults(TrainingConfig)):
        if key not in UNREMARKABLE:
            notes.append(f"training.{key}: checkpoint {old!r}, this run {new!r}")
    for key, new in (("tokenizer_sha256", tokenizer_sha256), ("data_fingerprint", data_fingerprint)):
        if state.get(key) != new:
            problems.append(f"{key}: checkpoint {state.get(key)!r}, this run {new!r}")
    if problems:
        lines = "\n".join(f"  {line}" for line in problems)
        raise CheckpointError(
            f"{folder}: made for another run:\n{lines}\n  train with the checkpoint's own config.yaml and data, "
            "or start anew with --output-dir"
        )
    return notes


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
