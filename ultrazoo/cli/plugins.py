"""``ultrazoo plugins``: what is installed, what it offers, whether it was checked, and why something is left out."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ultrazoo import __version__
from ultrazoo.cli.console import print_json, print_table

if TYPE_CHECKING:
    from ultrazoo.plugins import Plugin

OFFERS = ("blocks", "ops", "presets")


def plugins(
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Tell what each op runs on here; kernels that are not built yet are.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the installed plugins: version, blocks, ops, presets, the last check, and why a broken one is left out."""
    from ultrazoo.registry import registry

    zoo = registry()
    found = [_facts(plugin, kernels) for plugin in zoo.plugins]
    if as_json:
        print_json(found)
        return
    _print(found)
    problems = [("left out", plugin.origin, plugin.reason) for plugin in zoo.plugins if plugin.error]
    problems += [("clash", "", line) for line in zoo.clashes()]
    problems += [("skipped", "", line) for line in zoo.shadowed()]
    if problems:
        print()
        print_table("Problems", ("", "plugin", "reason and cure"), problems)


def _facts(plugin: Plugin, kernels: bool) -> dict[str, Any]:
    return {
        "name": plugin.name,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "api": plugin.api,
        **{offer: [spec.name for spec in getattr(plugin, offer)] for offer in OFFERS},
        "kernels": [row for spec in plugin.ops for row in kernels_of(spec.name)] if kernels else None,
        "check": last_check(plugin),
        "disabled": plugin.disabled,
        "error": plugin.error,
    }


def _print(found: list[dict[str, Any]]) -> None:
    def counts(facts: dict[str, Any]) -> list[Any]:
        state = "broken" if facts["error"] else "disabled" if facts["disabled"] else None
        return [state or len(facts[offer]) for offer in OFFERS]

    headers = ("name", "distribution", "version", "API", *OFFERS, "last check")
    rows = [
        (f["name"], f["distribution"], f["version"], f["api"] or "-", *counts(f), _verdict(f["check"])) for f in found
    ]
    print_table("Plugins", headers, rows)
    offers = [(facts["name"], offer, ", ".join(facts[offer])) for facts in found for offer in OFFERS if facts[offer]]
    print()
    print_table("Offers", ("plugin", "", "names"), offers)
    status = [row for facts in found for row in facts["kernels"] or []]
    if status:
        print()
        rows = [
            (k["op"], k["device"], "compiled" if k["compiled"] else "reference", k["detail"], k["fix"]) for k in status
        ]
        print_table("Kernels", ("op", "device", "runs", "why", "cure"), rows)


def kernels_of(op: str) -> list[dict[str, Any]]:
    """What an op runs on each device that is here; kernels that are not built yet are built."""
    import torch

    from ultrazoo.ops.library import kernel_status, library_of

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if library_of(op) is None:
        missing = {"compiled": False, "detail": "it is not defined by an OpLibrary", "fix": "define it by one"}
        return [{"op": op, "device": device, **missing} for device in devices]
    return [asdict(kernel_status(op, device)) for device in devices]


def last_check(plugin: Plugin) -> dict[str, Any]:
    """Return what the last ``ultrazoo check`` of a plugin found.

    Returns:
        ``state`` is ``passed``, ``failed``, ``stale`` (made for another version), ``unreadable`` (damaged, or others
        can write it) or ``not checked``; beside it is what the check wrote down.
    """
    from ultrazoo.caches import untrusted
    from ultrazoo.verdicts import verdict_path

    path = verdict_path(plugin.name)
    if path.exists() and (reason := untrusted(path)):
        return {"state": "unreadable", "path": str(path), "reason": reason}
    try:
        verdict = json.loads(path.read_text(encoding="utf-8"))
        made_for = (verdict["version"], verdict["ultrazoo"])
        state = "passed" if verdict["passed"] is True else "failed"
    except FileNotFoundError:
        return {"state": "not checked"}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return {"state": "unreadable", "path": str(path), "reason": f"{type(error).__name__}: {error}"}
    return {**verdict, "state": state if made_for == (plugin.version, __version__) else "stale"}


def _verdict(check: dict[str, Any]) -> str:
    state = str(check["state"])
    if state == "passed":
        return f"passed {check.get('checks', '?')} checks, {check.get('when', '')}"
    if state == "failed":
        return f"FAILED {check.get('failed', '?')} of {check.get('checks', '?')} checks, {check.get('when', '')}"
    if state == "stale":
        return f"stale: made for {check['version']} with ultrazoo {check['ultrazoo']}"
    return f"unreadable: {check['path']}" if state == "unreadable" else state
