"""The curves of a run, drawn from its metrics.jsonl."""

from __future__ import annotations

import json
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrazoo.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = dict[str, Any]
PANELS = {
    "lr": "learning rate",
    "grad_norm": "gradient norm, before clipping",
    "tokens_per_second": "tokens per second",
}


def read_metrics(run_dir: Path) -> list[Record]:
    """Return the records of a run in the order of their steps.

    Where a resumed run repeated steps, the later record of each counts. A last line that was cut off while it was being
    written is left out.

    Raises:
        DataError: There is no metrics.jsonl, a line is not a record, or there is none.
    """
    path = run_dir / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror}; expected the folder of a run, such as runs/embbert"
        ) from error
    merged: dict[int, Record] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            merged.setdefault(operator.index(record["step"]), {}).update(record)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if number == len(lines):
                break
            raise DataError(f"{path}:{number}: got {line[:80]!r}, expected a JSON object with a step") from error
    if not merged:
        raise DataError(f"{path}: no records; the run has not logged a step yet")
    return [merged[step] for step in sorted(merged)]


def series(records: Sequence[Record], name: str) -> tuple[list[int], list[float]]:
    """Return the steps and values of the records that have a number under ``name``."""
    found = [(record["step"], record[name]) for record in records if isinstance(record.get(name), int | float)]
    return [step for step, _ in found], [float(value) for _, value in found]


def plot_run(run_dir: Path, output: Path) -> Path:
    """Draw loss, learning rate, gradient norm and tokens per second over the steps of a run to a PNG.

    Args:
        run_dir: The run folder.
        output: File to write.

    Raises:
        DataError: The run has no records, or the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(run_dir)
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharex=True)
    figure.suptitle(run_dir.resolve().name)
    _draw_losses(axes[0, 0], records)
    for axis, (name, title) in zip((axes[0, 1], axes[1, 0], axes[1, 1]), PANELS.items(), strict=True):
        axis.plot(*series(records, name), color="tab:blue", linewidth=1.2)
        axis.set_title(title, loc="left")
        axis.set_ylim(bottom=0)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("step")
    try:
        figure.savefig(output, dpi=120, format="png")
    except OSError as error:
        raise DataError(f"{output}: cannot be written: {error.strerror or error}; choose another --output") from error
    return output


def _draw_losses(axis: Axes, records: Sequence[Record]) -> None:
    axis.set_title("loss, nats per masked token", loc="left")
    axis.plot(*series(records, "loss"), color="tab:blue", linewidth=1.2, label="training")
    steps, losses = series(records, "validation_loss")
    if steps:
        axis.plot(steps, losses, color="tab:orange", marker="o", markersize=4, label="validation")
    _, entropies = series(records, "unigram_entropy")
    if entropies:
        axis.axhline(entropies[-1], color="gray", linestyle="--", linewidth=1, label="unigram entropy of the text")
    axis.legend()
