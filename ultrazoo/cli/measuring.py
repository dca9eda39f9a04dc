"""What the commands that measure have in common: checks of options, threads, and what is on the screen meanwhile."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ultrazoo.errors import ConfigError

if TYPE_CHECKING:
    import torch


def check_folders(output: Path | None, plot: Path | None) -> None:
    """Refuse a file in a folder that is not there, before anything is measured."""
    for option, path in (("--output", output), ("--plot", plot)):
        if path is not None and not path.resolve().parent.is_dir():
            raise ConfigError(f"{option}: {path}: the folder {path.resolve().parent} is not there; make it first")


def check_clock(cpu_time: bool, device: torch.device) -> None:
    """Refuse the cores' time where the cores do not do the work."""
    if cpu_time and device.type != "cpu":
        raise ConfigError(
            f"--cpu-time: got it with device {str(device)!r}, expected cpu: it counts the time of the host's cores, "
            "and the work is done elsewhere; leave it out"
        )


def quiet_level() -> int:
    """The log level while something is measured: warnings, unless ``ULTRAZOO_LOG`` asks for another."""
    return logging.WARNING if "ULTRAZOO_LOG" not in os.environ else logging.NOTSET


@contextmanager
def use_threads(count: int | None) -> Iterator[None]:
    """Give torch a number of threads for a while."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def log_level(level: int) -> Iterator[None]:
    """Keep what the kernels say below a level off the screen: the rows say which of them ran."""
    logger = logging.getLogger("ultrazoo")
    before = logger.level
    logger.setLevel(max(before, level))
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def show_progress() -> Iterator[Callable[[str], None]]:
    """Show what is being measured on a terminal; say nothing elsewhere."""
    from rich.console import Console

    console = Console(stderr=True, markup=False, highlight=False)
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status("checking parity") as status:
        yield lambda text: status.update(f"measuring {text}")
