"""``ultrazoo bench``: times an op, a block or a preset, and compares runs; ``quality`` has a module of its own."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from ultrazoo.cli.console import print_json, print_table, say
from ultrazoo.cli.measuring import check_clock, check_folders, log_level, quiet_level, show_progress, use_threads
from ultrazoo.cli.quality import quality
from ultrazoo.errors import DataError

if TYPE_CHECKING:
    from ultrazoo.bench.session import Bench

DTYPES = ("float32", "bfloat16", "float16")


class _NameFirst(TyperGroup):
    """``bench NAME`` is ``bench run NAME``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args and args[0] in self.commands else ["run", *args])


app = typer.Typer(
    cls=_NameFirst,
    help="Time an op, a block or a preset on this machine, compare two such runs, or hold mixers to synthetic tasks.",
)


def _lengths(sweep: str | None, length: int | None) -> list[int] | None:
    if length is not None and sweep is not None:
        raise typer.BadParameter("got --sweep and --length, expected one of them")
    if sweep is None:
        return None if length is None else [length]
    first, dots, last = sweep.partition("..")
    parts = [first, last] if dots else sweep.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"got {sweep!r}, expected FIRST..LAST as in 32..8192, or lengths as in 128,512,2048")
    numbers = [int(part) for part in parts]
    if not dots:
        return sorted(set(numbers))
    if numbers[0] > numbers[1]:
        raise typer.BadParameter(f"got {sweep!r}, expected the shorter length first")
    return [numbers[0] << i for i in range((numbers[1] // numbers[0]).bit_length())]


app.command("quality")(quality)


@app.command("run")
def run(
    name: Annotated[str, typer.Argument(help="An op, a block, a preset, or a YAML file; or `compare`, `quality`.")],
    sweep: Annotated[
        str | None, typer.Option(metavar="FIRST..LAST", help="Lengths, doubled from FIRST on; or a list with commas.")
    ] = None,
    length: Annotated[int | None, typer.Option(min=1, help="One length.")] = None,
    backend: Annotated[
        str | None,
        typer.Option(help="With commas: compiled, reference, torch.compile (slow to prepare), or a baseline's name."),
    ] = None,
    backward: Annotated[bool, typer.Option("--backward", help="Forward and backward together.")] = False,
    hidden_size: Annotated[int | None, typer.Option(min=1, show_default="384", help="Width of a block.")] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, show_default="2048 tokens in all; a preset's own", help="Rows of a call.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16; for a preset, mixed precision.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    cpu_time: Annotated[
        bool,
        typer.Option("--cpu-time", help="Count the cores' time instead of the clock's: for one thread, when busy."),
    ] = False,
    seconds: Annotated[float, typer.Option(min=0.0, help="Measuring time for each sample.")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Append the rows to this JSONL file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw time per token over the length to this PNG.")] = None,
) -> None:
    """Hold an op, a block or a preset to its reference, then time it; exit 3 if it fails, and nothing is timed.

    `ultrazoo bench compare A.jsonl B.jsonl` compares two files that --output wrote.
    """
    if dtype not in DTYPES:
        raise typer.BadParameter(f"got {dtype!r}, expected one of {', '.join(DTYPES)}", param_hint="--dtype")
    lengths = _lengths(sweep, length)
    check_folders(output, plot)
    import torch

    from ultrazoo.bench.crossover import panels
    from ultrazoo.bench.machine import describe
    from ultrazoo.bench.records import append_rows
    from ultrazoo.bench.run import find, prepare_for, require_lengths
    from ultrazoo.bench.run import run as run_bench
    from ultrazoo.bench.session import Bench
    from ultrazoo.train.runtime import keep_memory, pick_device

    what = find(name)
    place = pick_device(device, "--device")
    check_clock(cpu_time, place)
    if plot is not None:
        require_lengths(what, lengths)
    if place.type == "cpu":
        keep_memory()
    prepare_for(what)
    with use_threads(threads), show_progress() as progress:
        machine = describe(place, "cpu" if cpu_time else "wall")
        if machine.is_busy and not cpu_time:
            say(
                f"note: load {machine.load:.1f} on {machine.cores} cores: threads that wait for each other are slow "
                "and uneven then; try again when the machine is free, or --threads 1 --cpu-time"
            )
        bench = Bench(
            device=place,
            dtype=getattr(torch, dtype),
            machine=machine,
            clock=time.process_time if cpu_time else time.perf_counter,
            seconds=seconds,
            backward=backward,
            backends=tuple(part.strip() for part in backend.split(",")) if backend else None,
            say=say,
            progress=progress,
        )
        try:
            with log_level(quiet_level()):
                run_bench(bench, what, lengths, hidden_size=hidden_size, batch=batch)
        finally:
            if output is not None and bench.rows:  # also what was measured before an error or Ctrl-C
                append_rows(output, bench.rows)
                say(f"appended {len(bench.rows)} rows to {output}")
    _print(bench, as_json)
    if noisy := sum(row.has_noisy_ceiling for row in bench.rows):
        say(
            f"note: {noisy} of {len(bench.rows)} rows, or their ceilings, are too noisy to use; run them again when "
            "the machine is free, or with --threads 1 --cpu-time"
        )
    if plot is not None:
        from ultrazoo.bench.chart import draw

        draw(panels(bench.rows), bench.machine, plot)
        say(f"wrote {plot}")


@app.command("compare")
def compare(
    before: Annotated[Path, typer.Argument(help="A file that --output wrote.")],
    after: Annotated[Path, typer.Argument(help="Another one.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Print the ratio of the times in two files, with a verdict where the quartiles do not overlap."""
    from ultrazoo.bench import compare as comparing
    from ultrazoo.bench.records import read_rows
    from ultrazoo.bench.tables import comparison

    old, new = read_rows(before), read_rows(after)
    changes = comparing.compare(old, new)
    if not changes:
        raise DataError(f"{before}, {after}: no rows in common; expected two runs of the same `ultrazoo bench NAME`")
    for note in comparing.notes(changes, old, new):
        say(f"note: {note}")
    for path, count in zip((before, after), comparing.unmatched(old, new), strict=True):
        if count:
            say(f"note: {count} rows are in {path} alone")
    if as_json:
        print_json([change.to_dict() for change in changes])
        return
    table = comparison(changes)
    print_table(table.title, table.headers, table.rows, right=table.right)


def _print(bench: Bench, as_json: bool) -> None:
    from ultrazoo.bench.crossover import crossings, panels
    from ultrazoo.bench.tables import tables_of

    crossed = [(panel.title, crossing) for panel in panels(bench.rows) for crossing in crossings(panel)]
    if as_json:
        print_json(
            {
                "machine": dataclasses.asdict(bench.machine),
                "parity": [dataclasses.asdict(check) for check in bench.parity],
                "crossings": [{"of": title, **dataclasses.asdict(crossing)} for title, crossing in crossed],
                "rows": [row.to_dict() for row in bench.rows],
            }
        )
        return
    print(bench.machine)
    gemm, copy = (median(getattr(row, name) for row in bench.rows) for name in ("gemm_gflops", "copy_gbytes"))
    print(f"ceilings, measured in the same rounds: matrix product {gemm:.1f} GFLOP/s, copy {copy:.1f} GB/s")
    tables = tables_of(bench.rows)
    for table in tables:
        print()
        print_table(table.title, table.headers, table.rows, right=table.right)
    print()
    print("\n".join(dict.fromkeys(table.legend for table in tables)))
    for title, crossing in crossed:
        print(f"{title}: {crossing}")
