"""``ultrazoo train --profile``: where the time of a step goes, part by part, and how much of it is matrix products."""

from __future__ import annotations

import os
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.autograd.profiler import record_function

from ultrazoo.errors import ConfigError
from ultrazoo.model import MaskedLM
from ultrazoo.train.durable import move_aside

if TYPE_CHECKING:
    from ultrazoo.train.loop import Trainer

PREFIX = "part: "
STEP, REST = "step", "other"
BACKWARD = "autograd::engine::evaluate_function: "
PRODUCTS = frozenset({"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"})
CEILING_SIZE, CEILING_REPEATS = 1024, 4


@dataclass
class Part:
    """What a part of the step took in all profiled steps."""

    seconds: float = 0.0
    flops: float = 0.0


@dataclass(frozen=True)
class Interval:
    """Numbers of the autograd nodes that a part's forward pass made: ``first <= number < stop``."""

    first: int
    stop: int
    part: str


@dataclass
class Found:
    """The figures of the profiled steps."""

    parts: dict[str, Part] = field(default_factory=lambda: defaultdict(Part))
    steps: int = 0
    clock: str = "wall clock"
    step_seconds: list[float] = field(default_factory=list)
    ceilings: list[float] = field(default_factory=list)
    """FLOP/s of a large product between the steps."""

    @property
    def ceiling(self) -> float:
        """FLOP/s, the median."""
        return statistics.median(self.ceilings)

    @property
    def gemm_share(self) -> float:
        """FLOPs of the products a second of the step, over the ceiling."""
        flops = sum(part.flops for part in self.parts.values()) / self.steps
        return flops / statistics.median(self.step_seconds) / self.ceiling


def parse_steps(text: str) -> range:
    """``20..22`` -> the steps 20, 21 and 22.

    Raises:
        ConfigError: It is not two numbers in order.
    """
    match = re.fullmatch(r"(\d+)\.\.(\d+)", text.strip())
    first, last = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= first <= last:
        raise ConfigError(f"--profile-steps: got {text!r}; expected FIRST..LAST, counted from 1, such as 20..22")
    return range(first, last + 1)


class StepProfiler:
    """Profiles some steps of a trainer, then prints a table and writes the trace; the numbers of the run stay the same.

    A forward pass is told apart by the module that runs; a backward node belongs to the module whose forward made it.

    Args:
        steps: Steps of this process to look at, counted from 1.
        trainer: The trainer, on a CPU, alone.
        trace: Chrome trace to write; an earlier one is moved aside.
        console: Takes the table.

    Raises:
        ConfigError: The steps run on a GPU or in many processes.
    """

    def __init__(self, steps: range, trainer: Trainer, trace: Path, console: Console) -> None:
        if trainer.device.type != "cpu" or trainer.team.size > 1:
            raise ConfigError(
                f"--profile: got device {trainer.device} and {trainer.team.size} process(es); expected one process on "
                "the CPU, where the time of an operator is that of its call; on a GPU use torch.profiler or nsys"
            )
        if trainer.training.compile:
            raise ConfigError(
                "--profile: got training.compile true, whose layers have no parts left to tell apart; set it to false"
            )
        self.steps, self.trainer, self.trace, self.console = steps, trainer, trace, console
        self.found = Found()
        self._taken = 0
        self._intervals: list[Interval] = []
        self._open: list[tuple[record_function, int, str]] = []
        self._hooks: list[Any] = []
        self._profile: Any = None
        self._clock = time.perf_counter
        if torch.get_num_threads() == 1:  # then other programs on the machine do not count
            self._clock, self.found.clock = time.process_time, "processor time"

    def step(self) -> None:
        """Take a step of the trainer, under watch if it is one of those asked for."""
        self._taken += 1
        if self._taken not in self.steps:
            self.trainer.step()
            return
        if self._taken == self.steps.start:
            self._begin()
        self.found.ceilings.append(product_rate(self.trainer.precision.dtype or torch.float32, self._clock))
        before = self._clock()
        with record_function(PREFIX + STEP):
            self.trainer.step()
        self.found.step_seconds.append(self._clock() - before)
        if self._taken == self.steps.stop - 1:
            self.finish()

    def finish(self) -> None:
        """Stop watching; print and write what was found, or say that the run did not get there."""
        if self._profile is None:
            if self._taken < self.steps.start:
                self.console.print(
                    f"profile: nothing was profiled: the run took {self._taken} steps, expected {self.steps.start} to "
                    f"{self.steps.stop - 1}; give others with --profile-steps",
                    soft_wrap=True,
                )
            return
        profile, self._profile = self._profile, None
        profile.__exit__(None, None, None)
        for hook in self._hooks:
            hook.remove()
        del self.trainer._next_batch, self.trainer._update
        self.found.steps = len(self.found.step_seconds)
        if not self.found.steps:
            return
        collect(profile.events(), self._intervals, self.found)
        if os.path.lexists(self.trace):
            move_aside(self.trace)
        profile.export_chrome_trace(str(self.trace))
        self.console.print(table(self.found))
        self.console.print(f"profile: trace for chrome://tracing or ui.perfetto.dev: {self.trace}", soft_wrap=True)

    def _begin(self) -> None:
        trainer = self.trainer
        for part, module in parts_of(trainer.model):
            self._hooks.append(module.register_forward_pre_hook(self._entered(part)))
            self._hooks.append(module.register_forward_hook(self._left, always_call=True))
        trainer._next_batch = _ranged("data", trainer._next_batch)  # type: ignore[method-assign]
        trainer._update = _ranged("optimiser", trainer._update)  # type: ignore[method-assign]
        activities = [torch.profiler.ProfilerActivity.CPU]
        self._profile = torch.profiler.profile(activities=activities, record_shapes=True, with_flops=True)
        self._profile.__enter__()

    def _entered(self, part: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: object) -> None:
            named = record_function(PREFIX + part)
            named.__enter__()
            self._open.append((named, torch.autograd._get_sequence_nr(), part))

        return hook

    def _left(self, module: nn.Module, arguments: object, output: object) -> None:
        named, first, part = self._open.pop()
        named.__exit__(None, None, None)
        self._intervals.append(Interval(first, torch.autograd._get_sequence_nr(), part))  # inner ones come first


def parts_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that the table tells apart; what is inside several of them belongs to the innermost.

    Raises:
        ConfigError: It is not a model of ultrazoo's own.
    """
    if not isinstance(model, MaskedLM):
        raise ConfigError(f"--profile: got a {type(model).__name__}, expected the model of a config")
    yield "head and loss", model
    yield "embeddings", model.embeddings
    if isinstance(norm := getattr(model.embeddings, "norm", None), nn.Module):
        yield "norms", norm
    for layer in model.layers:
        yield "dropout and residuals", layer
        for name, module in layer.named_children():
            part = {"mixer": f"mixer {layer.mixer_name}", "ffn": f"ffn {layer.ffn_name}"}.get(name)
            if part is not None or name.endswith("_norm"):
                yield part or "norms", module
    if model.final_norm is not None:
        yield "norms", model.final_norm


def product_rate(dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """FLOP/s of a product of two square matrices, the best of a few."""
    left, right = (torch.ones(CEILING_SIZE, CEILING_SIZE, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(CEILING_REPEATS):
        begun = clock()
        torch.mm(left, right)
        seconds.append(clock() - begun)
    return 2.0 * CEILING_SIZE**3 / min(seconds)


def collect(events: Sequence[Any], intervals: Sequence[Interval], found: Found) -> None:
    """Give each moment of the steps, and each product, to the innermost part that it lies in."""

    def part_of(event: Any) -> str | None:
        if event.name.startswith(PREFIX):
            return str(event.name.removeprefix(PREFIX))
        if event.name.startswith(BACKWARD):
            number = event.sequence_nr
            return next((i.part for i in intervals if i.first <= number < i.stop), REST)
        return None

    open_parts: list[tuple[str, float]] = []  # part, end; the outermost first
    for event in sorted(events, key=lambda event: (event.time_range.start, -event.time_range.end)):
        start, end = event.time_range.start, event.time_range.end
        while open_parts and open_parts[-1][1] <= start:
            open_parts.pop()
        part = part_of(event)
        if part is not None and (open_parts or part == STEP):
            part = REST if part == STEP else part
            found.parts[part].seconds += (end - start) * 1e-6
            if open_parts:
                found.parts[open_parts[-1][0]].seconds -= (end - start) * 1e-6
            open_parts.append((part, end))
        elif event.name in PRODUCTS and open_parts:
            found.parts[open_parts[-1][0]].flops += event.flops or 0


def table(found: Found) -> Table:
    """A row for each part, the largest first."""
    laid = Table(title=f"profile of {found.steps} step(s)", title_justify="left")
    laid.add_column("part")
    for name in ("ms a step", "share", "GFLOP", "of the ceiling"):
        laid.add_column(name, justify="right")
    traced = sum(part.seconds for part in found.parts.values())
    step = statistics.median(found.step_seconds)
    for name, part in sorted(found.parts.items(), key=lambda item: -item[1].seconds):
        seconds, flops = part.seconds / traced * step, part.flops / found.steps
        products = (f"{flops / 1e9:,.2f}", f"{flops / seconds / found.ceiling:.0%}") if flops else ("", "")
        laid.add_row(name, f"{seconds * 1e3:,.1f}", f"{part.seconds / traced:.1%}", *products)
    flops = sum(part.flops for part in found.parts.values()) / found.steps
    products = f"{flops / 1e9:,.2f}", f"{found.gemm_share:.0%}"
    laid.add_row("whole step", f"{step * 1e3:,.1f}", "100.0%", *products, style="bold")
    laid.caption = (
        f"ceiling: {found.ceiling / 1e9:,.1f} GFLOP/s, torch.mm of {CEILING_SIZE} x {CEILING_SIZE} between the steps, "
        f"{torch.get_num_threads()} thread(s), by {found.clock}; GFLOP are those of torch's matrix products, without "
        "those inside ultrazoo's operators"
    )
    return laid


def _ranged(part: str, work: Callable[[], Any]) -> Callable[[], Any]:
    def under() -> Any:
        with record_function(PREFIX + part):
            return work()

    return under
