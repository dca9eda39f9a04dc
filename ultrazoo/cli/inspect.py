"""``ultrazoo inspect``: what a checkpoint or a run was made with, and whether it is whole."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ultrazoo.cli.console import print_error, print_json, print_table, say

if TYPE_CHECKING:
    from ultrazoo.train.inspection import CheckpointReport, RunReport

DAMAGED = 1


def inspect(
    path: Annotated[Path, typer.Argument(help="A run folder or a checkpoint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON, config included.")] = False,
) -> None:
    """Print the receipt of a checkpoint, or the checkpoints of a run, and check every file against its manifest.

    Exit 1 when something is damaged. Nothing is changed and no trainer is disturbed.
    """
    from ultrazoo.train.inspection import CheckpointReport, inspect_path

    report = inspect_path(path)
    needed = [report] if isinstance(report, CheckpointReport) else report.checkpoints
    for line in dict.fromkeys(line for found in needed for line in found.missing_plugins):
        say(f"warning: {line}")
    problems = [report.problem] if isinstance(report, CheckpointReport) and report.problem else []
    if not isinstance(report, CheckpointReport):
        problems = report.problems
    if as_json:
        print_json(asdict(report))
    elif isinstance(report, CheckpointReport):
        _print_checkpoint(report)
    else:
        _print_run(report)
    for problem in problems:
        print_error(problem)
    if problems:
        raise typer.Exit(DAMAGED)
    say("every file has the size and SHA-256 of its manifest")


def _print_checkpoint(report: CheckpointReport) -> None:
    receipt = report.receipt
    data, validation = receipt.get("data", {}), receipt.get("validation", {})
    rows = [
        ("step", _number(report.step)),
        ("epoch", _number(receipt.get("epoch"), ".3f")),
        ("tokens", _number(receipt.get("tokens"))),
        ("training loss", _number(receipt.get("train_loss"), ".4f")),
        ("validation loss", _number(report.validation_loss, ".4f")),
        ("masked accuracy", _number(validation.get("accuracy"), ".2%")),
        ("weights", _number(report.weights)),
        ("optimiser numbers", _number(report.optimizer_numbers)),
        ("size", f"{report.bytes / 1e6:,.1f} MB"),
        ("written", receipt.get("written", "-")),
        ("ultrazoo, torch, Python", ", ".join(str(receipt.get(name, "-")) for name in ("ultrazoo", "torch", "python"))),
        ("packages", _pairs(receipt.get("packages", {}))),
        *(("plugin", _plugin(needed)) for needed in report.plugins),
        ("machine", ", ".join(str(receipt[name]) for name in ("platform", "processor") if name in receipt) or "-"),
        ("device", ", ".join(str(receipt[name]) for name in ("device", "device_name") if name in receipt) or "-"),
        ("threads", _number(receipt.get("num_threads"))),
        ("command", " ".join(receipt.get("command", [])) or "-"),
        ("data", data.get("fingerprint") or receipt.get("data_fingerprint", "-")),
        ("files, rows", f"{_number(data.get('files'))}, {_number(data.get('rows'))}"),
        ("rows skipped", _pairs(data.get("skipped", {}))),
        *(("damaged", text) for text in [*data.get("damage", {}).values(), *data.get("damaged_files", {}).values()]),
        ("tokenizer", receipt.get("tokenizer_sha256", "-")),
        ("rule revisions", _pairs(report.revisions)),
        ("kernel policy", receipt.get("kernel_policy", "-")),
        *((kernel["op"], _kernel(kernel)) for kernel in receipt.get("kernels", [])),
    ]
    print_table(report.path, ("", ""), rows)


def _print_run(report: RunReport) -> None:
    marks = {report.latest: "latest", report.best: "best"}
    if report.latest is not None and report.latest == report.best:
        marks = {report.latest: "latest, best"}
    print_table(
        report.path,
        ("checkpoint", "validation loss", "tokens", "MB", "written", "", ""),
        [
            (
                Path(found.path).name,
                _number(found.validation_loss, ".4f"),
                _number(found.receipt.get("tokens")),
                f"{found.bytes / 1e6:,.1f}",
                found.receipt.get("written", "-"),
                "damaged" if found.problem else "whole",
                marks.get(Path(found.path).name, ""),
            )
            for found in report.checkpoints
        ],
        right=("validation loss", "tokens", "MB"),
    )
    print()
    print_table(
        "Starts",
        ("from step", "ultrazoo", "torch", "device", "threads", "continues"),
        [
            (
                start.get("step", "-"),
                start.get("ultrazoo", "-"),
                start.get("torch", "-"),
                start.get("device", "-"),
                start.get("num_threads", "-"),
                start.get("resumed_from") or start.get("weights_from") or "",
            )
            for start in report.starts
        ],
        right=("from step", "threads"),
    )
    for name in report.set_aside:
        say(f"set aside as damaged: {name}")
    for name in report.flight_records:
        say(f"flight record: {report.path}/flight/{name}")


def _number(value: float | None, form: str = ",") -> str:
    return "-" if value is None else format(value, form)


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items()) or "none"


def _plugin(needed: dict[str, Any]) -> str:
    blocks = f" ({', '.join(needed['blocks'])})" if needed["blocks"] else ""
    return f"{needed['distribution']} {needed['version']}{blocks}"


def _kernel(kernel: dict[str, Any]) -> str:
    return f"{'compiled' if kernel['compiled'] else 'reference'}: {kernel['detail']}"
