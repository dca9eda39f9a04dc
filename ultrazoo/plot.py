"""The curves of a run, drawn from its metrics.jsonl."""

from __future__ import annotations

import io
import json
import logging
import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrazoo.arguments import file_path
from ultrazoo.errors import DataError
from ultrazoo.train.durable import move_aside, odd_kind, require_file, write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

log = logging.getLogger("ultrazoo")

Record = dict[str, Any]
PICTURE = "training.png"
"""Name of the picture in a run folder."""
MARK = "ultrazoo plot"
HEAD_BYTES = 1024
PANELS = {
    "lr": "learning rate",
    "grad_norm": "gradient norm, before clipping",
    "tokens_per_second": "tokens per second",
}


def read_metrics(run_dir: str | Path) -> list[Record]:
    """Return the records of a run in the order of their steps.

    Where a resumed run repeated steps, the later record of each counts. A last line that was cut off while it was being
    written is left out.

    Raises:
        DataError: There is no metrics.jsonl, a line is not a record, or there is none.
        ArgumentError: ``run_dir`` is no path.
    """
    path = file_path("run_dir", run_dir) / "metrics.jsonl"
    try:
        require_file(path)
        lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
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


def plot_run(run_dir: str | Path, output: str | Path) -> Path:
    """Draw loss, learning rate, gradient norm and tokens per second over the steps of a run to a PNG.

    Args:
        run_dir: The run folder.
        output: File to write; only a picture that was drawn here is replaced.

    Raises:
        DataError: The run has no records, or the file cannot be written or is another.
        ArgumentError: ``run_dir`` or ``output`` is no path.
    """
    run_dir, output = file_path("run_dir", run_dir), file_path("output", output)
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
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png", metadata={"Software": MARK})
    try:
        if os.path.lexists(output) and not _is_own(output):
            _make_room(run_dir, output)
        write_bytes(output, picture.getvalue())
    except OSError as error:
        raise DataError(f"{output}: cannot be written: {error.strerror or error}; choose another --output") from error
    return output


def _is_own(path: Path) -> bool:
    """Return whether a file is a picture that ``plot_run`` drew."""
    if odd_kind(path):
        return False
    with path.open("rb") as file:
        return f"Software\0{MARK}".encode() in file.read(HEAD_BYTES)


def _make_room(run_dir: Path, output: Path) -> None:
    """Move a picture that an earlier version drew in a run folder aside.

    Raises:
        DataError: The file is elsewhere, and may be anything.
    """
    if output != run_dir / PICTURE:
        raise DataError(
            f"{output}: exists already and was not drawn by ultrazoo plot; remove it, or choose another --output"
        )
    log.warning("%s: was not drawn by this version; kept as %s", output, move_aside(output).name)


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
