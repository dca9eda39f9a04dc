"""``ultrazoo list``, ``show`` and ``schema``: what is installed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ultrazoo.cli.console import print_json, print_table, say
from ultrazoo.cli.plugins import kernels_of
from ultrazoo.spec import KINDS

if TYPE_CHECKING:
    from ultrazoo.spec import BlockSpec

LAWS_BROKEN = 3

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def list_(as_json: Json = False) -> None:
    """List the blocks, by kind, with their papers, and the presets."""
    from ultrazoo.registry import registry

    zoo = registry()
    blocks = [
        {"name": name, "kind": kind, "paper": spec.paper, "plugin": zoo.home_of(name).name}
        for kind in KINDS
        for name, spec in zoo.blocks(kind).items()
    ]
    presets = [{"name": name, "summary": spec.summary, "path": str(spec.path)} for name, spec in zoo.presets().items()]
    if as_json:
        print_json({"blocks": blocks, "presets": presets})
        return
    columns = ("name", "kind", "paper", "plugin")
    print_table("Blocks", columns, [[block[column] for column in columns] for block in blocks])
    print()
    print_table("Presets", ("name", "summary"), [(preset["name"], preset["summary"]) for preset in presets])


def show(
    block: Annotated[str, typer.Argument(help="Name of a block, as in `ultrazoo list`.")],
    hidden_size: Annotated[int, typer.Option(min=1, help="Width at which parameters and state are counted.")] = 768,
    check: Annotated[
        bool,
        typer.Option("--check", help="Measure the block against each law here, within a minute; exit 3 if one breaks."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Show a block: paper, equation, options, parameters, state, kernels, and the laws that it is held to."""
    from ultrazoo.callables import construct
    from ultrazoo.config import ModelConfig, block_config, model_around
    from ultrazoo.ops.loader import without_builds
    from ultrazoo.registry import registry

    spec = registry().find_block(block)
    with without_builds():
        kernels = [kernel for op in spec.ops for kernel in kernels_of(op)]
    config = block_config(spec, model_around(spec, hidden_size))
    own = {name: field for name, field in spec.config.model_fields.items() if name not in ModelConfig.model_fields}
    facts: dict[str, Any] = {
        "name": spec.name,
        "kind": spec.kind,
        "paper": spec.paper,
        "equation": spec.equation,
        "parameters": sum(parameter.numel() for parameter in construct(spec, config).parameters()),
        "state_size": spec.state_size(config) if spec.state_size else None,
        "model_fields": {name: getattr(config, name) for name in spec.config.model_fields if name not in own},
        "options": {name: {"value": getattr(config, name), "help": field.description} for name, field in own.items()},
        "kernels": kernels,
        "laws": _laws(spec, check),
    }
    if as_json:
        print_json(facts)
    else:
        _print_facts(facts, hidden_size, spec)
    if not all(law.get("held", True) for law in facts["laws"]):
        raise typer.Exit(LAWS_BROKEN)


def _laws(spec: BlockSpec, check: bool) -> list[dict[str, Any]]:
    """The laws that apply to the block; measured here and now if asked for."""
    from ultrazoo.testing.laws import LAWS, laws_of, run_laws

    laws: list[dict[str, Any]] = [
        {"law": name, "says": (LAWS[name].__doc__ or "").replace("``", "")} for name in laws_of(spec.kind)
    ]
    if check:
        for entry, result in zip(laws, run_laws(spec), strict=True):
            entry |= {"held": result.passed, "what": result.what, "measured": result.measured, "limit": result.limit}
            entry |= {} if result.passed else {"place": result.place}
    return laws


def _print_facts(facts: dict[str, Any], hidden_size: int, spec: BlockSpec) -> None:
    state = "every key and value of the row" if facts["state_size"] is None else f"{facts['state_size']:,} numbers"
    about = {
        "kind": spec.kind,
        "paper": spec.paper,
        "equation": spec.equation,
        "parameters": f"{facts['parameters']:,} at hidden_size {hidden_size}",
        **({"state": state} if spec.kind == "mixer" else {}),
    }
    options = [(name, json.dumps(option["value"]), option["help"]) for name, option in facts["options"].items()]
    kernels = [
        (k["op"], k["device"], "compiled" if k["compiled"] else "reference", k["detail"]) for k in facts["kernels"]
    ]
    measured = any("held" in law for law in facts["laws"])
    laws = [(law["law"], _verdict(law) if measured else law["says"]) for law in facts["laws"]]
    beside = f" or in its place of the pattern: {{block: {spec.name}, ...}}" if spec.kind == "mixer" else ""
    tables: list[tuple[str, Sequence[str], Iterable[Sequence[Any]]]] = [
        (spec.name, ("", ""), about.items()),
        ("Read from the model section", ("field", "here"), facts["model_fields"].items()),
        (f"Options, under model.block_options.{spec.name}{beside}", ("option", "default", "meaning"), options),
        ("Kernels", ("op", "device", "runs", "why"), kernels),
        ("Laws, measured" if measured else "Laws (--check measures them)", ("", ""), laws),
    ]
    shown = [table for table in tables if table[2]]
    for number, (title, headers, rows) in enumerate(shown):
        print("\n" * (number > 0), end="")
        print_table(title, headers, rows)


def _verdict(law: dict[str, Any]) -> str:
    verdict = "holds" if law["held"] else "BROKEN"
    place = f" ({law['place']})" if law.get("place") else ""
    return f"{verdict}: {law['what']}: {law['measured']:.3g}, limit {law['limit']:.3g}{place}"


def schema(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write it to this file.")] = None,
) -> None:
    """Print the JSON Schema of a config file, with the blocks of every installed plugin."""
    from ultrazoo.config import json_schema

    text = json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
    if output is None:
        print(text, end="")
    else:
        output.write_text(text, encoding="utf-8")
        say(f"wrote {output}")
