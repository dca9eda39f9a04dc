"""Rows as tables to read: titles, headers and cells."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ultrazoo.bench.compare import Change
from ultrazoo.bench.crossover import Panel, panels
from ultrazoo.bench.records import NOISY, Row

MARK = "!"
NOISE = (
    f"!: too noisy to use: ± of the time, or of its ceiling, is over {NOISY:.0%}; run again when the machine is free, "
    "or with --threads 1 --cpu-time."
)
LEGEND = (
    "±: half the distance of the quartiles. x: times the time of the first backend. MiB: what a call adds at its peak."
    f"\n{NOISE}"
)
LEGEND_OVER_LENGTH = (
    "Thousand tokens per second at L tokens a row and B rows, "
    "± half the distance of the quartiles, x the time of the first backend.\n"
    "MiB: what a call adds at its peak, in the order of the backends. GFLOP/s and the share of GEMM: of the first.\n"
    + NOISE
)


@dataclass(frozen=True)
class Table:
    """A title, headers, and cells as text; the headers in ``right`` have their columns flushed right."""

    title: str
    headers: Sequence[str]
    rows: list[list[str]]
    right: Sequence[str] = ()
    legend: str = LEGEND


def tables_of(rows: Sequence[Row]) -> list[Table]:
    """Return a table over the lengths for what was swept, and a listing for everything else."""
    swept = panels(rows) if any(row.kind == "block" for row in rows) else []
    shown = {id(row) for panel in swept for line in panel.lines.values() for row in line}
    rest: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if id(row) not in shown:
            rest.setdefault((row.name, row.direction), []).append(row)
    return [over_length(panel) for panel in swept] + [listing(group) for group in rest.values()]


def over_length(panel: Panel) -> Table:
    """A line for each length, a column for each backend."""
    first = panel.lines[panel.first]
    names = list(panel.lines)
    by_length: dict[int, dict[str, Row]] = {}
    for name, line in panel.lines.items():
        for row in line:
            by_length.setdefault(row.length or 0, {})[name] = row
    has_flops = any(row.flops for row in first)
    headers = ["L", "B", *names, "MiB", *(["GFLOP/s", "of GEMM"] if has_flops else [])]
    cells = []
    for length, found in sorted(by_length.items()):
        lead = found.get(panel.first)
        any_row = next(iter(found.values()))
        cell = [str(length), str(any_row.batch or "")]
        cell += [_speed(found[name], lead) if name in found else "" for name in names]
        cell += [" / ".join(_mib(found[name]) if name in found else "-" for name in names)]
        if has_flops:
            cell += [_number(lead.gflops), _share(lead.gemm_percent, lead)] if lead else ["", ""]
        cells.append(cell)
    return Table(
        f"{panel.title}, {first[0].dtype}",
        headers,
        cells,
        right=("L", "B", "GFLOP/s", "of GEMM"),
        legend=LEGEND_OVER_LENGTH,
    )


def _speed(row: Row, lead: Row | None) -> str:
    ratio = "" if lead is None or lead is row else f" x{row.median_s / lead.median_s:.2f}"
    return f"{row.tokens_per_s / 1e3:>7,.1f} {_spread(row, 2)}{ratio:>7}".rstrip()


def _spread(row: Row, width: int = 0) -> str:
    return f"±{100 * row.spread:>{width}.0f}%{MARK if row.is_noisy else ''}"


def listing(rows: Sequence[Row]) -> Table:
    """A line for each sample and backend."""
    first = rows[0]
    has_cost = any(row.flops for row in rows)
    measures = ["ms", "±", "x", "tokens/s", *(["GFLOP/s", "of GEMM", "GB/s", "of copy"] if has_cost else []), "MiB"]
    leads: dict[str, Row] = {}
    cells = []
    for row in rows:
        is_lead = row.sample not in leads
        lead = leads.setdefault(row.sample, row)
        gemm, copy = _share(row.gemm_percent, row), _share(row.copy_percent, row)
        cost = [_number(row.gflops), gemm, _number(row.gbytes), copy]
        cells.append(
            [
                row.sample if is_lead else "",
                row.backend,
                _milliseconds(row.median_s),
                _spread(row).removeprefix("±"),
                f"{row.median_s / lead.median_s:.2f}",
                f"{row.tokens_per_s:,.0f}",
                *(cost if has_cost else []),
                _mib(row),
            ]
        )
    return Table(
        f"{first.name}: {first.direction}, {first.dtype}", ["sample", "backend", *measures], cells, right=measures
    )


def comparison(changes: Iterable[Change]) -> Table:
    """A line for each task and backend that two runs have in common."""
    cells = [
        [
            change.name,
            change.sample,
            change.direction,
            change.backend,
            f"{change.dtype} {change.device} x{change.threads}",
            _milliseconds(change.before_s),
            _milliseconds(change.after_s),
            f"{change.ratio:.2f}",
            f"{change.ceiling_ratio:.2f}",
            change.verdict,
        ]
        for change in changes
    ]
    measures = ["before, ms", "after, ms", "ratio", "GEMM"]
    headers = ["name", "sample", "direction", "backend", "on", *measures, "verdict"]
    return Table(
        "Time after over time before; GEMM: the same of the matrix product beside it", headers, cells, measures
    )


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.4g}" if seconds < 10 else f"{1e3 * seconds:.0f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def _share(percent: float | None, row: Row) -> str:
    return "" if percent is None else f"{percent:.0f}%{MARK if row.has_noisy_ceiling else ''}"


def _mib(row: Row) -> str:
    return "?" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}"
