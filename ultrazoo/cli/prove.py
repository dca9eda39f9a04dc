"""``ultrazoo parity`` and ``ultrazoo doctor``: what runs here, and whether it computes what it should."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ultrazoo.cli.console import print_json, print_table, say

if TYPE_CHECKING:
    from ultrazoo.testing.parity import Check

PARITY_FAILED = 3
DTYPES = ("float32", "bfloat16", "float16")

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def parity(
    subject: Annotated[str, typer.Argument(help="An op, a mixer, or all.")] = "all",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16 or float16; may be repeated.")] = None,
    as_json: Json = False,
) -> None:
    """Hold kernels to their references in float64, op by op and in whole models; exit 3 when one fails.

    An op with a compiled kernel is checked on it and on the reference; an op without one on the reference alone. A
    mixer is checked by its ops and by tiny models, one step and a training run of 50.
    """
    import torch

    from ultrazoo.errors import ConfigError, UnknownNameError
    from ultrazoo.registry import registry
    from ultrazoo.testing.model_parity import check_block
    from ultrazoo.testing.parity import backends_of, check_op

    for name in dtype or ():
        if name not in DTYPES:
            raise ConfigError(f"--dtype: got {name!r}, expected one of {', '.join(DTYPES)}")
    zoo = registry()
    ops = {spec.name.partition("::")[2]: spec for spec in zoo.ops().values()}
    mixers = {name: spec for name, spec in zoo.mixers().items() if spec.ops}
    if subject != "all" and subject not in ops and subject not in zoo.ops() and subject not in mixers:
        raise UnknownNameError("parity", subject, ["all", *ops, *mixers])
    target = torch.device(device)
    wanted = [spec for spec in ops.values() if subject in ("all", spec.name, spec.name.partition("::")[2])]
    if subject in mixers:
        wanted = [zoo.op(name) for name in mixers[subject].ops]
    found: list[Check] = []
    for spec in wanted:
        for name in dtype or spec.dtypes:
            for backend in backends_of(spec, target):
                say(f"parity: {spec.name} {name} {backend}")
                found += check_op(spec, target, getattr(torch, name), backend)
    for mixer in mixers.values():
        if subject in ("all", mixer.name):
            say(f"parity: models of {mixer.name}")
            found += check_block(mixer, target)
    _report(found, as_json)


def _report(found: list[Check], as_json: bool) -> None:
    failed = [check for check in found if not check.ok]
    if as_json:
        print_json({"passed": len(found) - len(failed), "failed": len(failed), "checks": [asdict(c) for c in found]})
    else:
        headers = ("subject", "dtype", "backend", "check", "error", "tolerance", "verdict", "detail")
        rows = [
            (c.subject, c.dtype, c.backend, c.check, _number(c.error), _number(c.tolerance), _word(c.ok), c.detail)
            for c in found
        ]
        print_table(f"Parity: {len(found) - len(failed)} of {len(found)} checks pass", headers, rows)
    if failed:
        for check in failed:
            say(f"FAILED {check.subject} {check.dtype} {check.backend}: {check.check}: {check.detail}")
        raise typer.Exit(PARITY_FAILED)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _word(ok: bool) -> str:
    return "ok" if ok else "FAIL"


def doctor(as_json: Json = False) -> None:
    """Tell what this installation runs: torch, compiler, instruction set, and each op's kernel with the reason."""
    import platform

    import torch

    import ultrazoo
    from ultrazoo.ops import build
    from ultrazoo.ops.library import get_kernel_policy, kernel_status
    from ultrazoo.ops.loader import cpu_isa
    from ultrazoo.registry import registry

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    statuses = [kernel_status(name, device) for name in registry().ops() for device in devices]
    try:
        compiler = build.find_compiler()
    except build.BuildError as error:
        compiler = f"none: {error}"
    facts: dict[str, Any] = {
        "ultrazoo": ultrazoo.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "compiler": compiler,
        "instruction set": cpu_isa() or "none: no compiled kernels are loaded",
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else _no_cuda(),
        "kernel policy": get_kernel_policy(),
    }
    if as_json:
        print_json({**facts, "ops": [asdict(status) for status in statuses]})
        return
    print_table("Machine", ("", ""), list(facts.items()))
    print()
    rows = [(s.op, s.device, "compiled" if s.compiled else "reference", s.detail, s.fix) for s in statuses]
    print_table("Ops", ("op", "device", "runs", "why", "fix"), rows)


def _no_cuda() -> str:
    import torch

    return "built into torch, no device found" if torch.version.cuda else "this torch is a CPU build"
