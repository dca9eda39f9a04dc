"""Nothing is timed before parity holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch

from ultrazoo.errors import UltrazooError
from ultrazoo.ops.library import KernelStatus, kernel_status, library_of
from ultrazoo.spec import OpSpec, Sample
from ultrazoo.testing import parity
from ultrazoo.testing.op_checks import ERRORS, raised


class ParityError(UltrazooError):
    """An op does not compute what its reference computes."""

    exit_code = 3


def kernel_of(spec: OpSpec, device: torch.device) -> KernelStatus | None:
    """Return the state of an op's compiled kernel; None for a plugin's op, which picks its kernel by itself."""
    return kernel_status(spec.name, device.type) if library_of(spec.name) else None


def require_parity(
    specs: Iterable[OpSpec], device: torch.device, dtype: torch.dtype, say: Callable[[str], None]
) -> list[parity.Check]:
    """Hold what will be timed to its reference, and return the verdicts.

    An op with a compiled kernel is checked on it; one without, on its reference; a plugin's op, against the reference
    that the plugin gave.

    Args:
        specs: The ops that will be timed.
        device: Where.
        dtype: In what.
        say: Takes a line for each op.

    Raises:
        ParityError: A check failed; the message has every failed check.
    """
    found: list[parity.Check] = []
    for spec in specs:
        checks = list(_checks(spec, device, dtype))
        failed = [check for check in checks if not check.ok]
        if failed:
            lines = "\n".join(f"  {_told(check)}" for check in failed)
            raise ParityError(
                f"{spec.name} ({checks[0].backend}, {checks[0].dtype}, {device}): not timed, because {len(failed)} of "
                f"{len(checks)} parity checks failed:\n{lines}"
            )
        say(f"parity: {spec.name} ({checks[0].backend}, {checks[0].dtype}): {len(checks)} checks hold")
        found += checks
    return found


def _checks(spec: OpSpec, device: torch.device, dtype: torch.dtype) -> Iterator[parity.Check]:
    status, cases = kernel_of(spec, device), parity.Cases(spec, device, dtype)
    samples = cases.samples  # a plugin's error in making them is no verdict
    backend: parity.Backend = "op"
    if status is None:
        verdicts = _against_reference(spec, samples, device, dtype)
    else:
        backend = "compiled" if status.compiled else "reference"
        verdicts = parity.check_op(spec, device, dtype, backend, cases=cases)
    try:
        yield from verdicts
    except ERRORS as error:
        yield _verdict(spec, device, dtype, backend, "runs", False, detail=raised(error, spec))


def _against_reference(
    spec: OpSpec, samples: Iterable[Sample], device: torch.device, dtype: torch.dtype
) -> Iterator[parity.Check]:
    """Outputs and gradients of a plugin's op by the rule of the parity harness, the truth its reference in float64."""
    by_reference = replace(spec, op=spec.reference)
    for sample in samples:
        got = parity.run(spec, sample)
        truth, same = parity.run(by_reference, sample, torch.float64), parity.run(by_reference, sample)
        for kind, factor in (("outputs", parity.FORWARD_FACTOR), ("gradients", parity.GRADIENT_FACTOR)):
            ours, theirs = getattr(got, kind), getattr(truth, kind)
            if set(ours) != set(theirs):
                detail = f"{sorted(set(ours) ^ set(theirs))} missing on one side"
                yield _verdict(spec, device, dtype, "op", f"{kind} of {sample.name}", False, detail=detail)
                continue
            for name, want in theirs.items():
                error = parity.relative_error(ours[name], want)
                own = parity.relative_error(getattr(same, kind)[name], want)
                allowed = factor * own + parity.floor_of(dtype)
                label = "forward" if kind == "outputs" else f"gradient of {name}"
                ok = error <= allowed
                yield _verdict(spec, device, dtype, "op", label, ok, error, allowed, f"on {sample.name}")


def _verdict(
    spec: OpSpec,
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
    check: str,
    ok: bool,
    error: float | None = None,
    tolerance: float | None = None,
    detail: str = "",
) -> parity.Check:
    return parity.Check(
        subject=spec.name,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        backend=backend,
        check=check,
        ok=ok,
        error=error,
        tolerance=tolerance,
        detail=detail,
    )


def _told(check: parity.Check) -> str:
    figures = "" if check.error is None else f"error {check.error:.3g}, allowed {check.tolerance:.3g}; "
    return f"{check.check}: {figures}{check.detail}"
