"""``ultrazoo parity`` and ``ultrazoo doctor``: what runs here, and whether it computes what it should."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ultrazoo.cli.console import print_json, print_table, say

if TYPE_CHECKING:
    from ultrazoo.ops import OpLibrary
    from ultrazoo.testing.measure import Check

PARITY_FAILED = 3
DTYPES = ("float32", "bfloat16", "float16")
GROUPS = ("all", "ops", "blocks")

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def parity(
    subject: Annotated[
        str, typer.Argument(help="An op (retention, gla::chunk), a mixer, ops, blocks, or all.")
    ] = "all",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16 or float16; may be repeated.")] = None,
    isa: Annotated[
        list[str] | None,
        typer.Option(
            help="portable, avx2, avx512 or avx512vnni; may be repeated.", show_default="all that this CPU has"
        ),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="A row for each check.")] = False,
    as_json: Json = False,
) -> None:
    """Hold kernels to their references in float64, op by op and in whole models; exit 3 when one fails.

    An op, ultrazoo's or a plugin's, is checked on its compiled kernel, in each instruction set, and on its reference. A
    mixer is checked by its ops, by the laws of the mixer contract, and by a tiny model, in one step and a training run
    of 50.
    """
    import torch

    from ultrazoo.errors import ConfigError, UnknownNameError
    from ultrazoo.ops import kernel_status
    from ultrazoo.registry import registry
    from ultrazoo.testing.model_parity import check_block, with_kernels
    from ultrazoo.testing.parity import Cases, backends_of, check_op, isas_of
    from ultrazoo.train.runtime import pick_device

    for name in dtype or ():
        if name not in DTYPES:
            raise ConfigError(f"--dtype: got {name!r}, expected one of {', '.join(DTYPES)}")
    zoo, target = registry(), pick_device(device, "--device")
    ops, mixers = zoo.ops(), zoo.mixers()
    short = {name: name.partition("::")[2] for name in ops}
    if subject not in (*GROUPS, *ops, *short.values(), *mixers):
        known = [
            own if namespace == "ultrazoo" else full for full in ops for namespace, _, own in [full.partition("::")]
        ]
        raise UnknownNameError("parity", subject, [*GROUPS, *known, *mixers])
    wanted = [spec for name, spec in ops.items() if subject in ("all", "ops", name, short[name])]
    if subject in mixers:
        wanted = [zoo.op(name) for name in mixers[subject].ops]
    found: list[Check] = []
    for spec in wanted:
        for name in dtype or spec.dtypes:
            say(f"parity: {spec.name} {name}")
            kind: torch.dtype = getattr(torch, name)
            cases = Cases(spec, target, kind)
            backends = backends_of(spec, target)
            if "compiled" not in backends and with_kernels([spec.name], target):
                status = kernel_status(spec.name, target.type)
                say(f"parity: {spec.name}: by its reference alone: {status.detail}; {status.fix}")
            for backend in backends:
                levels = (isa or isas_of(spec, target)) if backend == "compiled" else [None]
                for level in levels:
                    first = level == levels[0]
                    found += check_op(spec, target, kind, backend, isa=level, cases=cases, opcheck=first)
    for mixer in mixers.values():
        if subject in ("all", "blocks", mixer.name):
            say(f"parity: {mixer.name}")
            found += check_block(mixer, target)
    failed = [check for check in found if not check.ok]
    if as_json:
        print_json({"passed": len(found) - len(failed), "failed": len(failed), "checks": [asdict(c) for c in found]})
    else:
        print_table(f"Parity: {len(found) - len(failed)} of {len(found)} checks pass", *_table(found, verbose))
    if failed:
        for check in failed:
            say(f"FAILED {check.subject} {check.dtype} {_runs(check)}: {check.check}: {check.detail}")
        raise typer.Exit(PARITY_FAILED)


def _table(found: list[Check], verbose: bool) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """Return headers and rows: one for each check, or for all of them on one subject, dtype and backend."""
    if verbose:
        headers = ("subject", "dtype", "runs", "check", "error", "tolerance", "verdict", "detail")
        return headers, [
            (c.subject, c.dtype, _runs(c), c.check, _number(c.error), _number(c.tolerance), _verdict([c]), c.detail)
            for c in found
        ]
    groups: dict[tuple[str, str, str], list[Check]] = {}
    for check in found:
        groups.setdefault((check.subject, check.dtype, _runs(check)), []).append(check)
    rows = [
        (
            *key,
            _worst(check for check in group if check.check in ("forward", "model loss")),
            _worst(check for check in group if "gradient" in check.check and "law" not in check.check),
            f"{sum(check.ok for check in group)} of {len(group)}",
            _verdict(group),
        )
        for key, group in groups.items()
    ]
    return ("subject", "dtype", "runs", "forward error / allowed", "worst gradient", "checks", "verdict"), rows


def _runs(check: Check) -> str:
    return f"{check.backend} {check.isa}".rstrip()


def _worst(checks: Iterable[Check]) -> str:
    """Error and tolerance of the check that came nearest to its tolerance."""
    measured = [(c.error, c.tolerance) for c in checks if c.error is not None and c.tolerance is not None]
    if not measured:
        return ""
    error, allowed = max(measured, key=lambda pair: pair[0] / pair[1] if pair[1] > 0 else float("inf"))
    return f"{error:.1e} / {allowed:.1e}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _verdict(group: Iterable[Check]) -> str:
    return "ok" if all(check.ok for check in group) else "FAIL"


def doctor(
    as_json: Json = False,
    build: Annotated[bool, typer.Option("--build", help="Compile the kernels that are missing first.")] = False,
) -> None:
    """Report what this installation runs: torch, compiler, the kernel libraries, and each op's kernel with the reason.

    Nothing is compiled without --build: of kernels that are missing it says what would be.
    """
    from ultrazoo.ops.library import libraries
    from ultrazoo.ops.loader import without_builds
    from ultrazoo.ops.prepare import prepare_libraries
    from ultrazoo.registry import registry

    registry().ops()  # loads the plugins, which make their libraries
    if build:
        prepare_libraries(libraries())
    with without_builds():
        _report(as_json)


def _report(as_json: bool) -> None:
    import platform

    import torch

    import ultrazoo
    from ultrazoo.ops import build
    from ultrazoo.ops.library import get_kernel_policy, kernel_status, libraries, library_of
    from ultrazoo.ops.loader import cpu_isa, cuda_kernels
    from ultrazoo.registry import registry

    ops = [name for name in registry().ops() if library_of(name)]  # others choose their kernels by themselves
    own = [_library(library) for library in libraries().values()]
    devices = ["cpu", *(["cuda"] if torch.version.cuda or any(map(cuda_kernels, libraries())) else [])]
    statuses = [kernel_status(name, device) for name in ops for device in devices]
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
        "nvcc": _nvcc(),
        "cuda kernels": _cuda_kernels("ultrazoo"),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else _no_cuda(),
        "kernel policy": get_kernel_policy(),
    }
    if as_json:
        print_json({**facts, "libraries": own, "ops": [asdict(status) for status in statuses]})
        return
    print_table("Machine", ("", ""), list(facts.items()))
    print()
    headers = ("namespace", "of", "ops", "kernels", "cuda kernels", "where, or why not", "fix")
    print_table("Libraries", headers, [tuple(each.values()) for each in own])
    print()
    rows = [(s.op, s.device, "compiled" if s.compiled else "reference", s.detail, s.fix) for s in statuses]
    print_table("Ops", ("op", "device", "runs", "why", "fix"), rows)


def _no_cuda() -> str:
    import torch

    return "built into torch, no device found" if torch.version.cuda else "this torch is a CPU build"


def _nvcc() -> str:
    """The nvcc that a build would take now, and what it would compile for; or why there is none, and the fix."""
    from ultrazoo.ops import build

    try:
        found = build.find_cuda_here()
    except build.BuildError as error:
        return f"none: {error}"
    return f"{found.nvcc} {found.version}, compiles for {' '.join(found.archs)}"


def _library(library: OpLibrary) -> dict[str, Any]:
    """One library of ops: whose it is, what its kernels run, and where they are or why there are none."""
    from ultrazoo.ops import loader

    loaded = loader.load(library.namespace)
    isa = loader.cpu_isa(library.namespace)
    return {
        "namespace": library.namespace,
        "of": library.origin,
        "ops": len(library.ops),
        "kernels": f"compiled, {isa}" if isa else "references alone",
        "cuda kernels": _cuda_kernels(library.namespace),
        "detail": str(loaded.path or loaded.reason),
        "fix": loaded.fix if library.has_sources else "",
    }


def _cuda_kernels(namespace: str) -> str:
    """What the CUDA kernels of a library were compiled for, and which GPU here they do not run on."""
    from ultrazoo.ops import build, loader, nvcc

    made, path = loader.cuda_kernels(namespace), loader.load(namespace).path
    if made is None:
        why = build.without_cuda(path, loader.sources_of(namespace)) if path else None
        return f"none: {why}" if why else "none: no compiled kernels are loaded"
    left_out = [device / 10 for device in nvcc.device_archs() if not nvcc.runs_on(made.archs, device)]
    lacking = f"; not for the GPU of capability {left_out[0]} here: set TORCH_CUDA_ARCH_LIST to it" if left_out else ""
    return f"compiled by CUDA {made.nvcc} for {' '.join(made.archs)}{lacking}"
