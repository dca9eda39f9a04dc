"""The rows that a benchmark finds, and the JSON Lines files that keep them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ultrazoo.bench.machine import Machine
from ultrazoo.errors import DataError
from ultrazoo.spec import Cost

SCHEMA_VERSION = 1
NOISY = 0.25
"""Half the distance of the quartiles over the median, above which a time is too noisy to use."""
Kind = Literal["op", "block", "model"]
Direction = Literal["forward", "forward + backward", "training step"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What one row times, whichever backend does it."""

    kind: Kind
    name: str
    sample: str
    direction: Direction
    tokens: int
    batch: int | None = None
    length: int | None = None
    cost: Cost | None = None
    """Of one call, in the direction that is timed."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One backend on one task: seconds per call, and what follows from them."""

    machine: Machine
    kind: Kind
    name: str
    sample: str
    backend: str
    direction: Direction
    dtype: str
    device: str
    threads: int
    clock: str
    tokens: int
    batch: int | None
    length: int | None
    median_s: float
    q1_s: float
    q3_s: float
    rounds: int
    peak_bytes: int | None
    """What a call adds to the peak memory of the process."""
    flops: float | None
    bytes: float | None
    gemm_gflops: float
    """1024-cubed matrix product in the dtype, median over the same rounds."""
    copy_gbytes: float
    """Copy of 64 MiB, bytes read and written in GB/s, median over the same rounds."""
    gemm_spread: float | None = None
    """Of the time of that product, as ``spread``; None in files of before it was kept."""
    copy_spread: float | None = None
    """Of the time of that copy."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.median_s

    @property
    def gflops(self) -> float | None:
        return None if self.flops is None else self.flops / self.median_s / 1e9

    @property
    def gbytes(self) -> float | None:
        return None if self.bytes is None else self.bytes / self.median_s / 1e9

    @property
    def gemm_percent(self) -> float | None:
        return None if self.gflops is None else 100 * self.gflops / self.gemm_gflops

    @property
    def copy_percent(self) -> float | None:
        return None if self.gbytes is None else 100 * self.gbytes / self.copy_gbytes

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, as a share of the median."""
        return (self.q3_s - self.q1_s) / 2 / self.median_s

    @property
    def is_noisy(self) -> bool:
        """True when the time differs too much between the rounds to be used."""
        return self.spread > NOISY

    @property
    def has_noisy_ceiling(self) -> bool:
        """True when the time, or that of a ceiling, differs too much for the shares of the ceilings to be used."""
        return max(self.spread, self.gemm_spread or 0.0, self.copy_spread or 0.0) > NOISY

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: the fields and what follows from them."""
        derived = ("tokens_per_s", "gflops", "gbytes", "gemm_percent", "copy_percent", "is_noisy", "has_noisy_ceiling")
        return {"schema_version": SCHEMA_VERSION, **asdict(self), **{name: getattr(self, name) for name in derived}}


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Append rows to a JSON Lines file.

    Raises:
        DataError: It cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row.to_dict(), ensure_ascii=False) + "\n" for row in rows)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written: {error.strerror or error}; choose another file for --output"
        ) from error


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a JSON Lines file, in its order.

    Raises:
        DataError: The file cannot be read, or a line is not a row of this schema version.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}; expected a file that --output wrote") from error
    return [_row(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]


def _row(line: str, where: str) -> Row:
    try:
        data = json.loads(line)
        version = data["schema_version"]
        if version != SCHEMA_VERSION:
            raise DataError(
                f"{where}: got schema_version {version}, expected {SCHEMA_VERSION}; measure again with this ultrazoo"
            )
        values = {name: data[name] for name in Row.__dataclass_fields__ if name in data}
        return Row(**{**values, "machine": Machine(**values["machine"])})
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{where}: got {line[:80]!r}, expected a row that --output wrote: {error!r}") from error
