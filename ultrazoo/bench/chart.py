"""The crossover chart: time per token over the length, a line for each backend."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ultrazoo.bench.crossover import Crossing, Panel, crossings
from ultrazoo.bench.machine import Machine
from ultrazoo.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")
MARKERS = "os^Dvp"


def draw(panels: Sequence[Panel], machine: Machine, output: Path) -> None:
    """Draw panels side by side to a PNG.

    Args:
        panels: At least one.
        machine: Named under the drawing.
        output: File to write.

    Raises:
        DataError: It cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(6.6 * columns, 4.8 * rows + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    backends = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    for axis, panel in zip(axes.flat, panels, strict=False):
        _draw_panel(axis, panel, backends)
    figure.supxlabel(str(machine), fontsize=8, color="0.35")
    try:
        figure.savefig(output, dpi=130, format="png")
    except OSError as error:
        raise DataError(f"{output}: cannot be written: {error.strerror or error}; choose another --plot") from error


def _draw_panel(axis: Axes, panel: Panel, backends: Sequence[str]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    dtype = panel.lines[panel.first][0].dtype
    for name, line in panel.lines.items():
        number = backends.index(name)
        color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
        lengths = [row.length or 0 for row in line]
        axis.plot(
            lengths,
            [1e6 * row.median_s / row.tokens for row in line],
            color=color,
            marker=marker,
            markersize=4.5,
            linewidth=2.2 if name == panel.first else 1.4,
            label=name,
            zorder=3 if name == panel.first else 2,
        )
        low, high = ([1e6 * getattr(row, q) / row.tokens for row in line] for q in ("q1_s", "q3_s"))
        axis.fill_between(lengths, low, high, color=color, alpha=0.18, linewidth=0)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    every = sorted({row.length or 0 for line in panel.lines.values() for row in line})
    axis.set_xticks(every, [str(length) for length in every])
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=15))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    for crossing in crossings(panel):
        if crossing.length is not None:
            _mark(axis, crossing.length, crossing, late=crossing.length**2 > every[0] * every[-1])
    _label_ends(axis, panel)
    axis.grid(alpha=0.25)
    axis.set_title(f"{panel.title}, {dtype}", loc="left", fontsize=10)
    axis.set_xlabel("L, tokens of a row")
    axis.set_ylabel("µs per token (median, quartiles)")
    axis.legend(fontsize=9, loc="upper left")


def _mark(axis: Axes, length: float, crossing: Crossing, late: bool) -> None:
    """A line where two backends change places, labelled on the side that has room."""
    axis.axvline(length, color="0.45", linestyle=":", linewidth=1.2)
    axis.annotate(
        f"L ≈ {length:.0f}\n{crossing.fast} passes\n{crossing.slow}",
        (length, 0.98 if late else 0.02),
        xycoords=("data", "axes fraction"),
        xytext=(-4 if late else 4, 0),
        textcoords="offset points",
        ha="right" if late else "left",
        va="top" if late else "bottom",
        fontsize=8,
        color="0.25",
    )


def _label_ends(axis: Axes, panel: Panel) -> None:
    """At the longest length of each other line, how many times the first backend's time it takes there."""
    times = {row.length: row.median_s / row.tokens for row in panel.lines[panel.first]}
    low, high = axis.get_ylim()
    room = (high / low) ** 0.03
    below = 0.0
    ends = [line[-1] for name, line in panel.lines.items() if name != panel.first]
    for row in sorted(ends, key=lambda row: row.median_s / row.tokens):
        place = 1e6 * row.median_s / row.tokens
        if row.length not in times or place < below * room:
            continue
        below = place
        label = f"{row.median_s / row.tokens / times[row.length]:.1f}x"
        spot = (row.length or 0, place)
        axis.annotate(label, spot, xytext=(7, -3), textcoords="offset points", fontsize=8, color="0.25")
    axis.margins(x=0.09)
