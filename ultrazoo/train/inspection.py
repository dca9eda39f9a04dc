"""What lies in a checkpoint or a run folder, and whether it is whole; nothing is loaded but headers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ultrazoo.arguments import file_path
from ultrazoo.config.needs import missing
from ultrazoo.errors import CheckpointError
from ultrazoo.revisions import RULES
from ultrazoo.train.checkpoint import MODEL, OPTIMIZER, RECEIPT, read_config, read_state, verify_checkpoint
from ultrazoo.train.durable import MANIFEST, read_json
from ultrazoo.train.folder import RunFolder
from ultrazoo.train.formats import Receipt
from ultrazoo.train.store import CheckpointStore

ASIDE = re.compile(r"step-\d+\.damaged(-\d+)?")


@dataclass(frozen=True, kw_only=True)
class CheckpointReport:
    """One checkpoint; what cannot be read of a damaged one is empty."""

    path: str
    problem: str | None
    """Why it is not whole; None if every file has the size and SHA-256 of the manifest."""
    bytes: int
    files: dict[str, int] = field(default_factory=dict)
    step: int | None = None
    validation_loss: float | None = None
    weights: int | None = None
    """Numbers in the model's tensors, each shared one counted once; so for the optimiser."""
    optimizer_numbers: int | None = None
    revisions: dict[str, int] = field(default_factory=dict)
    """Revision of each rule that the run follows; one that it does not mention is at 1."""
    receipt: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def plugins(self) -> list[dict[str, Any]]:
        """Distribution, version and blocks of each plugin that it needs; older receipts do not tell the blocks."""
        told = self.receipt.get("plugins", [])
        if isinstance(told, dict):
            return [{"distribution": name, "version": version, "blocks": []} for name, version in told.items()]
        return list(told)

    @property
    def missing_plugins(self) -> list[str]:
        """What stands between this installation and loading it: a line for each plugin that is not there."""
        needed = {plugin["distribution"]: plugin["version"] for plugin in self.plugins}
        gone = missing({**needed, **self.config.get("plugins", {})})
        return [f"{distribution}: {reason}" for distribution, reason in gone.items()]


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """A run folder."""

    path: str
    starts: list[dict[str, Any]]
    """Each start and resume, with its environment."""
    latest: str | None
    best: str | None
    checkpoints: list[CheckpointReport]
    set_aside: list[str]
    """Damaged checkpoints that a resume put out of the way."""
    flight_records: list[str]

    @property
    def problems(self) -> list[str]:
        """What is wrong with its checkpoints."""
        return [report.problem for report in self.checkpoints if report.problem is not None]


def inspect_path(path: str | Path) -> CheckpointReport | RunReport:
    """Look into a checkpoint or a run folder.

    Args:
        path: A folder such as ``runs/embbert/checkpoints/step-000500`` or ``runs/embbert``.

    Raises:
        CheckpointError: It is neither.
        ArgumentError: It is no path.
    """
    path = file_path("path", path)
    if (path / MANIFEST).is_file() or (path / MODEL).is_file():
        return inspect_checkpoint(path)
    root = path if path.name == "checkpoints" else path / "checkpoints"
    if root.is_dir() or (path / "env.json").is_file():
        return inspect_run(root.parent)
    state = "holds neither a checkpoint nor a run" if path.is_dir() else "no such folder"
    raise CheckpointError(f"{path}: {state}; expected runs/embbert or runs/embbert/checkpoints/step-000500")


def inspect_checkpoint(folder: Path) -> CheckpointReport:
    """Verify a checkpoint and read its receipt, state and headers."""
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    problems: list[str] = []

    def read(what: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
        try:
            return what() or {}
        except CheckpointError as error:
            problems.append(str(error))
            return {}

    read(lambda: verify_checkpoint(folder))
    state = read(lambda: read_state(folder))
    receipt = read(lambda: read_json(folder / RECEIPT, Receipt)) if RECEIPT in files else _receipt_of_state(state)
    config = read(lambda: read_config(folder))
    return CheckpointReport(
        path=str(folder),
        problem=problems[0] if problems else None,
        bytes=sum(files.values()),
        files=files,
        step=state.get("step"),
        validation_loss=state.get("validation_loss"),
        weights=_numbers(folder / MODEL),
        optimizer_numbers=_numbers(folder / OPTIMIZER),
        revisions={name: 1 for name in RULES if state} | state.get("revisions", {}),
        receipt=receipt,
        config=config,
    )


def inspect_run(run_dir: Path) -> RunReport:
    """Verify every checkpoint of a run, and list what else its folder tells."""
    root = run_dir / "checkpoints"
    pointers = {}
    for name in ("latest", "best"):
        pointer = root / name
        pointers[name] = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else None
    flights = sorted((run_dir / "flight").glob("step-*")) if (run_dir / "flight").is_dir() else []
    aside = sorted(path for path in root.iterdir() if ASIDE.fullmatch(path.name)) if root.is_dir() else []
    return RunReport(
        path=str(run_dir),
        starts=_starts(run_dir),
        latest=pointers["latest"],
        best=pointers["best"],
        checkpoints=[inspect_checkpoint(path) for path in CheckpointStore(root, 0, 0).folders()],
        set_aside=[path.name for path in aside],
        flight_records=[path.name for path in flights],
    )


def _starts(run_dir: Path) -> list[dict[str, Any]]:
    try:
        return RunFolder(run_dir).listed()
    except CheckpointError:
        return []


def _receipt_of_state(state: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint from before there were receipts tells."""
    names = ("step", "epoch", "ultrazoo", "torch", "device", "num_threads", "tokenizer_sha256", "data_fingerprint")
    return {name: state[name] for name in names if name in state}


def _numbers(path: Path) -> int | None:
    """Numbers in a safetensors file, by its header; None if there is none."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in list(file.keys()))
    except (OSError, SafetensorError):
        return None
