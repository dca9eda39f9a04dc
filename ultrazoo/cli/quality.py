"""``ultrazoo bench quality``: trains mixers on tasks whose optimum is known."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated

import typer

from ultrazoo.cli.console import print_json, print_table, say
from ultrazoo.cli.measuring import check_clock, check_folders, log_level, quiet_level, show_progress, use_threads


def quality(
    blocks: Annotated[
        list[str] | None,
        typer.Argument(metavar="BLOCK", show_default="every mixer that is installed", help="Mixers."),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(show_default="one of each", help="recall:PAIRS, copy:TOKENS or markov:ORDER; may be repeated."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, show_default="400", help="Updates of each training run.")] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.001, help="Equal time in place of equal steps: for each training run.")
    ] = None,
    size: Annotated[int, typer.Option(min=16, help="Width of the model.")] = 64,
    layers: Annotated[int, typer.Option(min=1, help="Layers.")] = 2,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = 32,
    rate: Annotated[
        list[float] | None,
        typer.Option(show_default="0.006 and 0.002", help="A learning rate to try; may be repeated."),
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(min=0, show_default="0", help="May be repeated.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    cpu_time: Annotated[
        bool,
        typer.Option("--cpu-time", help="Count the cores' time instead of the clock's: for one thread, when busy."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Append each row to this JSONL file as it ends.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Take over the rows that --output has already.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw accuracy over the size of the state to this PNG.")] = None,
) -> None:
    """Train mixers on synthetic tasks whose optimum is known, at equal parameters, steps, rows and learning rates.

    `ultrazoo bench quality retnet mamba --task recall:32` compares two mixers on one task.
    """
    if steps is not None and minutes is not None:
        raise typer.BadParameter("got --steps and --minutes, expected one of them")
    if resume and output is None:
        raise typer.BadParameter("got --resume without --output, expected the file whose rows are to be kept")
    if rate and min(rate) <= 0:
        raise typer.BadParameter(f"got {min(rate):g}, expected a rate above 0", param_hint="--rate")
    check_folders(output, plot)
    from ultrazoo.bench.machine import describe
    from ultrazoo.bench.quality import rows as files
    from ultrazoo.bench.quality import tables
    from ultrazoo.bench.quality.run import QualityBench, mixers_named
    from ultrazoo.bench.quality.tasks import DEFAULT_TASKS, find_task
    from ultrazoo.ops import prepare_blocks
    from ultrazoo.train.runtime import keep_memory, pick_device

    specs = mixers_named(blocks or [])
    tasks = [find_task(text) for text in dict.fromkeys(task or DEFAULT_TASKS)]
    place = pick_device(device, "--device")
    check_clock(cpu_time, place)
    if place.type == "cpu":
        keep_memory()
    defaults = files.Settings()
    settings = files.Settings(
        size=size,
        layers=layers,
        steps=None if minutes is not None else steps or defaults.steps,
        minutes=minutes,
        batch=batch,
        rates=tuple(dict.fromkeys(rate or defaults.rates)),
    )
    kept = files.take_up(output) if resume and output is not None else []

    def keep(row: files.QualityRow) -> None:
        if output is not None:
            files.append(output, row)
        say(str(row))

    prepare_blocks(specs)
    with use_threads(threads), show_progress() as progress, log_level(quiet_level()):
        bench = QualityBench(
            settings=settings,
            device=place,
            machine=describe(place, "cpu" if cpu_time else "wall"),
            clock=time.process_time if cpu_time else time.perf_counter,
            say=say,
            progress=progress,
            keep=keep,
        )
        bench.run(specs, tasks, list(dict.fromkeys(seed or [0])), kept, strict=bool(blocks))
    if as_json:
        print_json({"machine": dataclasses.asdict(bench.machine), "rows": [row.to_dict() for row in bench.rows]})
    else:
        print(bench.machine)
        print()
        found = tables.table(bench.rows)
        print_table(found.title, found.headers, found.rows, right=found.right)
        print()
        print(found.legend)
    if plot is not None:
        tables.draw(bench.rows, bench.machine, plot)
        say(f"wrote {plot}")
