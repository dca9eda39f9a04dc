"""``ultrazoo check``: the conformance kit on a plugin, a block, an op, or all that is installed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ultrazoo.cli.console import print_table, say
from ultrazoo.cli.measuring import check_folders, log_level, quiet_level, show_progress

if TYPE_CHECKING:
    from ultrazoo.testing.conformance_result import Result

CHECK_FAILED = 1


def check(
    target: Annotated[
        str, typer.Argument(metavar="PLUGIN|BLOCK|all", help="As `ultrazoo plugins` and `list` name it.")
    ],
    quick: Annotated[
        bool, typer.Option("--quick", help="Less than 20 seconds a block: float32 alone, no compiled whole model.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every result, with versions; - for stdout.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a badge table for a README; - for stdout.")
    ] = None,
) -> None:
    """Hold blocks, ops and presets to all that they must keep; exit 1 if a check fails, after the others have run.

    Laws of the blocks, whole models with them, thirty steps of training, parity of the ops on every backend, presets,
    size, and speed against attention. The verdict on a plugin is shown by `ultrazoo plugins`.
    """
    files = [path for path in (json_file, markdown) if path is not None]
    check_folders(*(None if path == Path("-") else path for path in (json_file, markdown)))
    from ultrazoo.ops import prepare
    from ultrazoo.testing.conformance import plan, plugins_of
    from ultrazoo.testing.conformance_report import Report, write_verdict

    tasks = plan(target, quick=quick)
    prepare((task.subject for task in tasks if task.kind == "op"), packages=["ultrazoo"])
    results: list[Result] = []
    with show_progress() as progress, log_level(quiet_level()):
        for number, task in enumerate(tasks, start=1):
            progress(f"{number} of {len(tasks)}: {task.subject}, {task.check}")
            results.append(task.run())
    report = Report(target=target, quick=quick, results=results)
    for path, text in ((json_file, report.to_json), (markdown, report.to_markdown)):
        if path == Path("-"):
            print(text(), end="")
        elif path is not None:
            path.write_text(text(), encoding="utf-8")
            say(f"wrote {path}")
    for plugin in plugins_of(target):
        write_verdict(plugin, report)
    if Path("-") not in files:
        _print(report.target, results, {state: count for state, count in report.counts.items() if count})
    for result in report.failed:
        say(f"FAILED {result}")
    if report.failed:
        raise typer.Exit(CHECK_FAILED)


def _print(target: str, results: list[Result], counts: dict[str, int]) -> None:
    told = ", ".join(f"{count} {state}" for state, count in counts.items())
    rows = [
        (
            result.subject,
            result.check,
            "FAILED" if result.state == "failed" else result.state,
            result.figures,
            f"{result.seconds:.1f} s",
            result.what,
        )
        for result in results
    ]
    headers = ("subject", "check", "verdict", "figure", "took", "of what")
    print_table(f"Conformance of {target}: {told}", headers, rows, right=("took",))
