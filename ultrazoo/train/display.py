"""What a person sees: a progress bar on a terminal, plain lines elsewhere, and a table at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

REFRESH_SECONDS = 0.5
BAR_WIDTH = 12


class Display(Protocol):
    """Shows where a run stands."""

    def advance(self, step: int, share: float) -> None:
        """Called after every step; must cost next to nothing."""

    def record(self, record: Mapping[str, Any], share: float, eta: float | None) -> None:
        """Called with each record of metrics.jsonl that has a loss."""

    def say(self, line: str) -> None:
        """Show one line of text."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class PlainDisplay:
    """One line per record, for logs and pipes."""

    def __init__(self, console: Console, total_steps: int | None) -> None:
        self._console = console
        self._total = total_steps

    def advance(self, step: int, share: float) -> None:
        """Nothing to show between records."""

    def record(self, record: Mapping[str, Any], share: float, eta: float | None) -> None:
        """Print the record."""
        total = f"/{self._total}" if self._total else f" ({share:.0%})"
        self.say(f"step {record['step']}{total} {summary(record)} eta {duration(eta)}")

    def say(self, line: str) -> None:
        """Print one line."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Nothing to undo."""


class BarDisplay:
    """A bar with the figures of the newest record beside it; lines scroll by above it.

    There is no thread behind it: the bar is drawn anew at a step, at most twice a second.
    """

    def __init__(self, console: Console, total_steps: int | None) -> None:
        self._total = total_steps
        self._progress = Progress(
            TextColumn("[bold]{task.fields[where]}"),
            BarColumn(bar_width=BAR_WIDTH),
            TaskProgressColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            auto_refresh=False,
        )
        self._task = self._progress.add_task("", total=1.0, where="step 0", figures="")
        self._drawn = 0.0
        self._progress.start()

    def advance(self, step: int, share: float) -> None:
        """Move the bar."""
        now = time.monotonic()
        if now - self._drawn >= REFRESH_SECONDS:
            self._drawn = now
            where = f"step {step}/{self._total}" if self._total else f"step {step}"
            self._progress.update(self._task, completed=min(share, 1.0), where=where, refresh=True)

    def record(self, record: Mapping[str, Any], share: float, eta: float | None) -> None:
        """Change the figures."""
        self._progress.update(self._task, figures=f"eta {duration(eta)} {summary(record)}")

    def say(self, line: str) -> None:
        """Print one line above the bar."""
        self._progress.console.print(line, markup=False, highlight=False)

    def close(self) -> None:
        """Draw the bar a last time and give the cursor back."""
        self._progress.refresh()
        self._progress.stop()


def make_display(console: Console, total_steps: int | None) -> Display:
    """Choose the bar for a terminal that can move its cursor, else plain lines."""
    if console.is_terminal and not console.is_dumb_terminal:
        return BarDisplay(console, total_steps)
    return PlainDisplay(console, total_steps)


def summary(record: Mapping[str, Any]) -> str:
    """``loss 6.91 lr 3.2e-04 tok/s 12,345 grad 0.81 mem 512 MB``; the loss is None if there was no target."""
    loss = "none (no targets)" if record["loss"] is None else f"{record['loss']:.4f}"
    return (
        f"loss {loss} lr {record['lr']:.2e} tok/s {record['tokens_per_second']:,.0f} "
        f"grad {record['grad_norm']:.3f} mem {record['memory_bytes'] / 2**20:,.0f} MB"
    )


def duration(seconds: float | None) -> str:
    """``1:02:03``, ``2:03``, or ``-`` when nobody knows."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def final_table(result: Mapping[str, Any]) -> Table:
    """Lay out what ``train`` returns."""
    table = Table(title=f"ultrazoo: {result['run_dir']}", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right", overflow="fold")

    def number(value: float | None, form: str, missing: str = "-") -> str:
        return missing if value is None else format(value, form)

    rows = {
        "steps": number(result["steps"], ","),
        "tokens": number(result["tokens"], ","),
        "wall time": duration(result["seconds"]),
        "tokens/s": number(result["tokens_per_second"], ",.0f"),
        "waiting for data": number(result["data_wait_share"], ".1%"),
        "train loss": number(result["train_loss"], ".4f"),
        "validation loss": number(result["validation_loss"], ".4f", "none (no targets)"),
        "unigram entropy": number(result["unigram_entropy"], ".4f"),
        "perplexity": number(result["validation_perplexity"], ",.2f"),
        "masked accuracy": number(result["validation_accuracy"], ".2%"),
        "checkpoint": result["checkpoint"] or "-",
        "best checkpoint": result["best_checkpoint"] or "-",
    }
    for name in ("skipped_steps", "rollbacks"):
        if result.get(name):
            rows[name.replace("_", " ")] = number(result[name], ",")
    for name, value in rows.items():
        table.add_row(Text(name), Text(str(value)))
    return table
