"""The findings of the conformance kit as JSON, as a Markdown badge table, and as the verdict on a plugin."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ultrazoo import __version__
from ultrazoo.data.files import write_atomically
from ultrazoo.hookspecs import PLUGIN_API
from ultrazoo.plugins import Plugin
from ultrazoo.registry import registry
from ultrazoo.spec import KINDS
from ultrazoo.testing.conformance_result import Result
from ultrazoo.verdicts import verdict_path

FORMAT = 1
"""Of the JSON; raised when a field changes its meaning or goes."""
GROUPS = ("law", "compiled law", "ops", "model", "training")
"""First words of the checks of a block, each a column of badges."""
FIGURES = {"size: parameters": "parameters", "size: state": "state", "speed: against attention": "time / attention"}


def now() -> str:
    """The time as the report states it, in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that one run of ``ultrazoo check`` found."""

    target: str
    quick: bool
    results: Sequence[Result]
    when: str = field(default_factory=now)

    @property
    def failed(self) -> list[Result]:
        """The checks that failed."""
        return [result for result in self.results if result.state == "failed"]

    @property
    def counts(self) -> dict[str, int]:
        """How many results there are of each state; figures that nothing is held to are ``measured``."""
        states = ("passed", "failed", "not applicable", "measured")
        return {state: sum(result.state == state for result in self.results) for state in states}

    def to_json(self) -> str:
        """Return the report as one JSON document with the versions that it was made with."""
        made_by = {result.plugin for result in self.results}
        data = {
            "format": FORMAT,
            "target": self.target,
            "quick": self.quick,
            "when": self.when,
            "passed": not self.failed,
            "counts": self.counts,
            "versions": {
                "ultrazoo": __version__,
                "plugin_api": PLUGIN_API,
                "torch": torch.__version__,
                "python": platform.python_version(),
                "system": f"{platform.system()} {platform.machine()}",
                "plugins": {p.distribution: p.version for p in registry().plugins if p.name in made_by},
            },
            "results": [_plain(result) for result in self.results],
        }
        return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        """Return tables of text badges for a plugin's README: its blocks, then whatever else it offers."""
        rows = _by_subject(self.results)
        blocks = {key: found for key, found in rows.items() if key[0] in KINDS}
        lines = _block_table(blocks) if blocks else []
        others = [(kind, subject, found) for (kind, subject), found in rows.items() if kind not in KINDS]
        if others:
            lines += ["", "| | checks |", "| --- | --- |"] if blocks else ["| | checks |", "| --- | --- |"]
            lines += [f"| `{subject}` ({kind}) | {_badge(found)} |" for kind, subject, found in others]
        plugins = {result.plugin for result in self.results}
        made_with = {f"ultrazoo {__version__}", f"torch {torch.__version__}"}
        made_with |= {f"{p.distribution} {p.version}" for p in registry().plugins if p.name in plugins}
        call = f"`ultrazoo check {self.target}{' --quick' if self.quick else ''}`"
        lines += ["", f"{call} on {self.when[:10]}: {', '.join(sorted(made_with))}, {platform.machine()}."]
        return "\n".join(lines) + "\n"


def _block_table(rows: dict[tuple[str, str], list[Result]]) -> list[str]:
    found = [result for results in rows.values() for result in results]
    columns = [group for group in GROUPS if any(_group(result) == group for result in found)]
    figures = {check: name for check, name in FIGURES.items() if any(result.check == check for result in found)}
    lines = [
        f"| {' | '.join(['', *columns, *figures.values()])} |",
        f"| {' | '.join([*['---'] * (1 + len(columns)), *['---:'] * len(figures)])} |",
    ]
    for (kind, subject), results in rows.items():
        badges = [_badge([result for result in results if _group(result) == group]) for group in columns]
        numbers = [_number(next((result for result in results if result.check == check), None)) for check in figures]
        lines.append(f"| {' | '.join([f'`{subject}` ({kind})', *badges, *numbers])} |")
    return lines


def write_verdict(plugin: Plugin, report: Report) -> Path:
    """Leave the verdict on a plugin where ``ultrazoo plugins`` looks for it, and return the path.

    Args:
        plugin: The plugin.
        report: Of all its checks; those of others in it are left out.
    """
    own = [result for result in report.results if result.plugin == plugin.name]
    failed = [result for result in own if result.state == "failed"]
    verdict = {
        "plugin": plugin.name,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "ultrazoo": __version__,
        "torch": torch.__version__,
        "passed": not failed,
        "checks": sum(result.state in ("passed", "failed") for result in own),
        "failed": len(failed),
        "failures": [f"{result.subject}: {result.check}" for result in failed],
        "quick": report.quick,
        "when": report.when,
    }
    path = verdict_path(plugin.name)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(verdict, indent=2, ensure_ascii=False) + "\n").encode())
    path.chmod(0o600)  # a verdict that others could have written is not believed
    return path


def _plain(result: Result) -> dict[str, Any]:
    """A result as JSON has it: numbers that are not finite are text."""
    data = asdict(result)
    for name in ("measured", "limit"):
        value = data[name]
        if value is not None and value - value != 0:
            data[name] = str(value)
    return {**data, "seconds": round(result.seconds, 3)}


def _by_subject(results: Iterable[Result]) -> dict[tuple[str, str], list[Result]]:
    rows: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        rows.setdefault((result.kind, result.subject), []).append(result)
    return rows


def _group(result: Result) -> str:
    return result.check.partition(":")[0]


def _badge(results: Sequence[Result]) -> str:
    """``pass 10/10`` or ``**FAIL** 9/10`` of the checks that apply; a dash where none does."""
    held = [result for result in results if result.state in ("passed", "failed")]
    passed = sum(result.state == "passed" for result in held)
    if not held:
        return "-"
    return f"{'pass' if passed == len(held) else '**FAIL**'} {passed}/{len(held)}"


def _number(result: Result | None) -> str:
    if result is None or result.state == "not applicable":
        return "-"
    if result.measured is None:
        return "keys and values" if result.state == "measured" else "**FAIL**"
    return f"{result.measured:,.0f}" if float(result.measured).is_integer() else f"{result.measured:.2f}"
