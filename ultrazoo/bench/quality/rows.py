"""What a run finds: one row for each mixer, task and seed, and the JSON Lines file that keeps them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ultrazoo.bench.machine import Machine
from ultrazoo.errors import DataError

SCHEMA_VERSION = 1
KIND = "quality"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is the same for every mixer."""

    size: int = 64
    """Width D of the model, and what sets the budget of parameters."""
    layers: int = 2
    steps: int | None = 400
    """Updates of each training run; None where the clock ends it."""
    minutes: float | None = None
    """Length of each training run in minutes of the clock; None where the steps end it."""
    batch: int = 32
    rates: tuple[float, ...] = (6e-3, 2e-3)
    """Peak learning rates, in the order in which they are tried."""


@dataclass(frozen=True, kw_only=True)
class QualityRow:
    """One mixer on one task from one seed, at the best learning rate."""

    machine: Machine
    name: str
    task: str
    seed: int
    settings: Settings
    parameters: int
    hidden_size: int
    ffn_hidden_size: int
    state_size: int | None
    """Numbers that a layer carries from one position to the next; None: every key and value of the row."""
    length: int
    learning_rate: float | None
    """The best of those tried; None where each ended in a loss that is not finite."""
    tried: dict[str, float | None]
    """Learning rate -> excess on the rows that choose it, in nats; None: not finite."""
    steps: int
    accuracy: float
    """Expected share of targets that the likeliest token hits."""
    best_accuracy: float
    """The same of the exact posterior."""
    loss: float | None
    """Nats per target on the labels as drawn."""
    floor: float
    """Mean entropy of the exact posterior, nats per target: the least expected loss there is."""
    excess: float | None
    """Expected loss under the exact posterior less ``floor``, nats per target: never below 0, 0 at the optimum."""
    train_tokens: int
    train_seconds: float
    """Of the best run: its steps, data included."""
    seconds: float
    """Of all runs of the row with their evaluations."""
    dtype: str
    device: str
    threads: int
    clock: str

    @property
    def tokens_per_s(self) -> float:
        return self.train_tokens / self.train_seconds if self.train_seconds else 0.0

    @property
    def kept(self) -> int:
        """Numbers that a layer can draw on: the state, or a key and a value of D numbers for each token."""
        return 2 * self.hidden_size * self.length if self.state_size is None else self.state_size

    @property
    def key(self) -> tuple[str, str, int, str, Settings]:
        """What was measured; rows with the same one are repetitions."""
        return self.name, self.task, self.seed, self.device, self.settings

    def __str__(self) -> str:
        rate = "no rate" if self.learning_rate is None else f"rate {self.learning_rate:g}"
        excess = "a loss that is not finite" if self.excess is None else f"{self.excess:.3f} nats over the optimum"
        result = f"{100 * self.accuracy:.1f} % of {100 * self.best_accuracy:.1f} %, {excess}"
        return f"{self.name}, {self.task}, seed {self.seed}: {result} ({rate}, {self.seconds:.0f} s)"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: the fields and what follows from them."""
        derived = {name: getattr(self, name) for name in ("tokens_per_s", "kept")}
        return {"schema_version": SCHEMA_VERSION, "kind": KIND, **asdict(self), **derived}


def append(path: Path, row: QualityRow) -> None:
    """Append a row to a JSON Lines file.

    Raises:
        DataError: It cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row.to_dict(), ensure_ascii=False, allow_nan=False) + "\n")
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written: {error.strerror or error}; choose another file for --output"
        ) from error


def read(path: Path) -> list[QualityRow]:
    """Return the rows of a JSON Lines file in its order; a last line that was cut off while it was written is left out.

    Raises:
        DataError: The file cannot be read, or a line is not a row of this schema version.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read: {error}; expected a file that `ultrazoo bench quality --output` wrote"
        ) from error
    whole = [(number, line) for number, line in enumerate(lines, start=1) if line.endswith("\n") and line.strip()]
    return [_row(line, f"{path}:{number}") for number, line in whole]


def take_up(path: Path) -> list[QualityRow]:
    """Return the rows of a file that is to be appended to, and cut off a last line that was not written to its end.

    Raises:
        DataError: The file is there and cannot be read or written, or has other lines.
    """
    if not path.exists():
        return []
    rows = read(path)
    whole, newline, rest = path.read_bytes().rpartition(b"\n")
    if rest:
        try:
            path.write_bytes(whole + newline)
        except OSError as error:
            raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error
    return rows


def _row(line: str, where: str) -> QualityRow:
    try:
        data = json.loads(line)
        if (data["kind"], data["schema_version"]) != (KIND, SCHEMA_VERSION):
            raise DataError(
                f"{where}: got kind {data['kind']!r}, schema_version {data['schema_version']}, expected {KIND!r}, "
                f"{SCHEMA_VERSION}; choose another file, or measure again with this ultrazoo"
            )
        values = {name: data[name] for name in QualityRow.__dataclass_fields__}
        settings = values["settings"]
        values["settings"] = Settings(**{**settings, "rates": tuple(settings["rates"])})
        return QualityRow(**{**values, "machine": Machine(**values["machine"])})
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{where}: got {line[:80]!r}, expected a row that `ultrazoo bench quality --output` wrote: {error!r}"
        ) from error
