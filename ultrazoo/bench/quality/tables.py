"""Rows as a table to read, and as a drawing of what each mixer reaches over what it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from ultrazoo.bench.chart import COLORS, MARKERS
from ultrazoo.bench.machine import Machine
from ultrazoo.bench.quality.rows import QualityRow
from ultrazoo.bench.tables import Table
from ultrazoo.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIDE_STEP = 0.15
"""Octaves between mixers that keep as many numbers."""
LEGEND = (
    "Accuracy in per cent of the masked tokens and, after /, excess: nats per masked token over the exact optimum.\n"
    "state: numbers that a layer carries along the row; all: every key and value. Thousand tokens/s and seconds: of "
    "training, and of all learning rates tried."
)


def table(rows: Sequence[QualityRow]) -> Table:
    """A line for each mixer, a column for each task; several seeds give the mean and, in brackets, the range."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    cells = []
    for name in dict.fromkeys(row.name for row in rows):
        own = [row for row in rows if row.name == name]
        counts = sorted({row.parameters for row in own})
        state = own[0].state_size
        shape = sorted({(row.hidden_size, row.ffn_hidden_size) for row in own})
        cells.append(
            [
                name,
                f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0] / 1e3:,.1f}-{counts[-1] / 1e3:,.1f}k",
                " ".join(f"{width}/{ffn}" for width, ffn in shape[:1]),
                "all" if state is None else f"{state:,}",
                *(_result([row for row in own if row.task == task]) for task in tasks),
                f"{fmean(row.tokens_per_s for row in own) / 1e3:,.1f}",
                f"{sum(row.seconds for row in own):,.0f}",
            ]
        )
    best = [next(row for row in rows if row.task == task) for task in tasks]
    optimum = [f"{100 * row.best_accuracy:.1f} / 0 (floor {row.floor:.3f})" for row in best]
    cells.append(["optimum", "", "", "", *optimum, "", ""])
    settings = rows[0].settings
    length = f"{settings.steps} steps" if settings.steps else f"{settings.minutes:g} minutes"
    return Table(
        f"At equal parameters: {settings.layers} layers, size {settings.size}, {length} of {settings.batch} rows",
        ["block", "parameters", "D/ffn", "state", *tasks, "ktokens/s", "s"],
        cells,
        right=("parameters", "D/ffn", "state", *tasks, "ktokens/s", "s"),
        legend=LEGEND,
    )


def _result(rows: Sequence[QualityRow]) -> str:
    if not rows:
        return ""
    finite = [row.excess for row in rows if row.excess is not None]
    excess = f"{fmean(finite):.3f}" if len(finite) == len(rows) else "not finite"
    accuracies = [100 * row.accuracy for row in rows]
    spread = f" ({min(accuracies):.1f}-{max(accuracies):.1f})" if len(rows) > 1 else ""
    return f"{fmean(accuracies):.1f}{spread} / {excess}"


def draw(rows: Sequence[QualityRow], machine: Machine, output: Path) -> None:
    """Draw a panel for each task to a PNG, over the numbers kept: the mean over seeds with its range.

    The height is accuracy where the optimum is 100 %, and excess where the truth itself is uncertain, since accuracies
    are close together there.

    Args:
        rows: At least one.
        machine: Named under the drawing.
        output: File to write.

    Raises:
        DataError: It cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row.task for row in rows))
    names = list(dict.fromkeys(row.name for row in rows))
    figure = Figure(figsize=(5.2 * len(tasks), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(tasks), squeeze=False)
    for axis, task in zip(axes.flat, tasks, strict=True):
        _draw_panel(axis, [row for row in rows if row.task == task], names)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(8, len(labels)), fontsize=9, frameon=False)
    figure.supxlabel(str(machine), fontsize=8, color="0.35")
    try:
        figure.savefig(output, dpi=130, format="png")
    except OSError as error:
        raise DataError(f"{output}: cannot be written: {error.strerror or error}; choose another --plot") from error


def _draw_panel(axis: Axes, rows: Sequence[QualityRow], names: Sequence[str]) -> None:
    from matplotlib.ticker import NullLocator

    certain, title = rows[0].floor == 0, f"{rows[0].task}, {rows[0].length} tokens"
    rows = [row for row in rows if certain or row.excess is not None]
    groups = {name: own for name in names if (own := [row for row in rows if row.name == name])}
    kept = {name: max(1, own[0].kept) for name, own in groups.items()}
    for name, own in groups.items():
        heights = [100 * row.accuracy if certain else row.excess or 0.0 for row in own]
        middle = fmean(heights)
        alike = [other for other in kept if kept[other] == kept[name]]
        shift = alike.index(name) - (len(alike) - 1) / 2  # side by side where they would cover each other
        number = names.index(name)
        color = COLORS[number % len(COLORS)]
        axis.errorbar(
            [kept[name] * 2 ** (SIDE_STEP * shift)],
            [middle],
            [[middle - min(heights)], [max(heights) - middle]],
            color=color,
            marker=MARKERS[(number + number // len(COLORS)) % len(MARKERS)],
            markerfacecolor="none" if own[0].state_size is None else color,
            markersize=8,
            linestyle="none",
            label=name,
        )
    axis.axhline(100 if certain else 0, color="0.45", linestyle=":", linewidth=1.2)
    axis.set_xscale("log", base=2)
    if kept:
        axis.set_xlim(min(kept.values()) / 2, max(kept.values()) * 2)
    axis.xaxis.set_minor_locator(NullLocator())
    if certain:
        axis.set_ylim(0, 104)
    else:
        axis.set_ylim(bottom=-0.03 * axis.get_ylim()[1])
    axis.grid(alpha=0.25)
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xlabel("numbers kept by a layer (hollow: keys and values of the row)")
    axis.set_ylabel("accuracy, % of masked tokens" if certain else "nats per masked token over the optimum")
