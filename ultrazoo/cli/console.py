"""Where output goes: data to stdout, everything said about it to stderr. NO_COLOR and pipes are honoured by rich."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPE_WIDTH = 1000
"""Columns of a table that no terminal shows: enough that no line is wrapped."""


def _console(stream: TextIO) -> Console:
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(file=stream, width=width, markup=False, highlight=False, emoji=False)


def print_table(title: str, headers: Sequence[str], rows: Iterable[Sequence[Any]], right: Sequence[str] = ()) -> None:
    """Print a table on stdout; columns named in ``right`` are flushed right."""
    console = _console(sys.stdout)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=any(headers))
    for header in headers:
        table.add_column(header, justify="right" if header in right else "left", overflow="fold", header_style="dim")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    console.print(Text(title, "bold"), soft_wrap=True)
    console.print(table)


def print_json(data: Any) -> None:
    """Print data on stdout as one indented JSON document."""
    print(json.dumps(data, indent=2, ensure_ascii=False))


def say(text: str) -> None:
    """Print a line of log on stderr."""
    _console(sys.stderr).print(text, soft_wrap=True)


def print_error(text: str) -> None:
    """Print an error on stderr, marked as such."""
    _console(sys.stderr).print(Text("error: ", "bold red"), Text(text), sep="", soft_wrap=True)


class _StderrHandler(logging.Handler):
    """Log records as lines on stderr, warnings marked as such."""

    def emit(self, record: logging.LogRecord) -> None:
        mark = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        say(mark + record.getMessage())


def log_to_stderr(*, quiet: bool = False) -> None:
    """Send the package's log to stderr, from the level in ``ULTRAZOO_LOG`` up.

    Args:
        quiet: When that is unset, begin at error and not at info: one of many processes speaks for all.
    """
    logger = logging.getLogger("ultrazoo")
    level = logging.getLevelName(os.environ.get("ULTRAZOO_LOG", "").upper())
    logger.setLevel(level if isinstance(level, int) else logging.ERROR if quiet else logging.INFO)
    logger.handlers = [_StderrHandler()]
