"""Holds every kernel to its reference, on this machine.

The truth is the reference in float64. A kernel passes when its error is at most twice the error of the reference run in
the kernel's own dtype (three times for gradients) plus a floor of two roundings of that dtype: no tolerance is tuned
for an op. Errors are the largest absolute difference over the largest absolute value of the truth.

The reference itself is held to finite differences in float64, and to float64 in its dtypes. An op of a plugin's
``OpLibrary`` is proved like ultrazoo's own; one whose kernels ultrazoo does not know (backend ``op``) is held to the
reference that the plugin gave, like a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch

from ultrazoo.errors import PluginError
from ultrazoo.ops import loader
from ultrazoo.ops.build import X86_FLAGS, folders_of, has_vnni
from ultrazoo.ops.library import kernel_policy, kernel_status, library_of
from ultrazoo.spec import OpSpec, Sample
from ultrazoo.testing import op_checks
from ultrazoo.testing.law_kit import with_gaps
from ultrazoo.testing.measure import (
    FORWARD_FACTOR,
    GRADIENT_FACTOR,
    Check,
    Run,
    badness,
    floor_of,
    named_arguments,
    relative_error,
    run,
)
from ultrazoo.testing.op_checks import ERRORS, Outcome

__all__ = [
    "FORWARD_FACTOR",
    "GRADIENT_FACTOR",
    "Backend",
    "Cases",
    "Check",
    "backends_of",
    "check_op",
    "floor_of",
    "isas_of",
    "relative_error",
    "run",
]

Backend = Literal["compiled", "reference", "op"]


@dataclass(frozen=True)
class Case:
    """A sample, the reference on it in float64, and the reference on it as it is."""

    sample: Sample
    truth: Run
    same: Run


class Cases:
    """The samples of an op in one dtype, with what the reference makes of them, computed once for all backends."""

    def __init__(self, spec: OpSpec, device: torch.device, dtype: torch.dtype) -> None:
        self._spec, self._device, self._dtype = spec, device, dtype
        self._reference = replace(spec, op=spec.reference)

    @cached_property
    def samples(self) -> list[Sample]:
        """The samples."""
        return list(self._spec.samples(self._device, self._dtype))

    @cached_property
    def gaps(self) -> list[Case]:
        """The first sample with segments, if any, with padding inside its documents."""
        for sample in self.samples:
            segments = named_arguments(self._reference, sample).get("segments")
            if segments is not None and segments.numel():
                return self._with_truth([op_checks.with_segments(self._reference, sample, with_gaps(segments))])
        return []

    @cached_property
    def cases(self) -> list[Case]:
        """The samples with their references."""
        return self._with_truth(self.samples)

    def _with_truth(self, samples: list[Sample]) -> list[Case]:
        with kernel_policy("reference"):
            return [
                Case(sample, run(self._reference, sample, torch.float64), run(self._reference, sample))
                for sample in samples
            ]


def check_op(
    spec: OpSpec,
    device: torch.device,
    dtype: torch.dtype,
    backend: Backend,
    *,
    isa: str | None = None,
    cases: Cases | None = None,
    opcheck: bool = True,
) -> Iterator[Check]:
    """Return every verdict on one op, dtype and backend.

    Args:
        spec: The op.
        device: Where.
        dtype: Of its samples.
        backend: What to hold to the reference.
        isa: Instruction set of compiled CPU kernels; None takes the best.
        cases: Of this op, device and dtype, to be used again.
        opcheck: Check schema, fake kernel and autograd too, which are the same for every instruction set.
    """
    cases = cases or Cases(spec, device, dtype)
    found, namespace = list[Check](), namespace_of(spec)
    on_cpu = backend == "compiled" and device.type == "cpu"
    runs_isa = (isa or loader.cpu_isa(namespace) or "") if on_cpu else ""

    def verdict(check: str, outcome: Outcome | None) -> None:
        if outcome is not None:
            found.append(
                Check(
                    subject=spec.name,
                    device=str(device),
                    dtype=str(dtype).removeprefix("torch."),
                    backend=backend,
                    check=check,
                    isa=runs_isa,
                    **outcome._asdict(),
                )
            )

    try:
        samples = cases.samples
    except PluginError as error:
        verdict("samples", Outcome(False, detail=str(error)))
        return iter(found)
    with ExitStack() as stack:
        if isa is not None:
            stack.enter_context(loader.use_cpu_isa(isa, namespace))
        if backend == "compiled":
            status = kernel_status(spec.name, device.type)
            verdict("kernel exists", Outcome(status.compiled, detail=status.detail))
            if not status.compiled:
                return iter(found)
        if backend != "op":
            stack.enter_context(kernel_policy(backend))
        if opcheck:
            verdict("opcheck", _guarded(spec, lambda: op_checks.registration(spec, samples)))
        try:
            references, gaps = cases.cases, cases.gaps
        except ERRORS as error:
            verdict("reference", Outcome(False, detail=op_checks.raised(error, spec)))
            return iter(found)
        for label, outcome in _accuracy(spec, references, dtype, backend).items():
            verdict(label, outcome)
        for label, outcome in _accuracy(spec, gaps, dtype, backend).items():
            verdict(f"{label}, padding inside documents", outcome)
        if device.type == "cpu":  # on a GPU it is a device-side assertion, which ends the process
            verdict("returning documents", _guarded(spec, lambda: op_checks.documents(spec, samples)))
        verdict("strides and poisoned memory", _guarded(spec, lambda: op_checks.memory(spec, samples, dtype)))
        verdict("padding is not read", _guarded(spec, lambda: op_checks.padding(spec, samples)))
        verdict("inputs unmodified", _guarded(spec, lambda: op_checks.unmodified(spec, samples)))
        verdict("reruns bit-equal", _guarded(spec, lambda: op_checks.repeatable(spec, samples)))
        if on_cpu:
            verdict("bit-equal at any threads", _guarded(spec, lambda: op_checks.same_by_any_threads(spec, samples)))
        exact = spec.differentiable and not spec.straight_through
        if backend == "reference" and exact and dtype == torch.float32:
            verdict("gradcheck in float64", _guarded(spec, lambda: op_checks.derivatives(spec, samples)))
    return iter(found)


def _guarded(spec: OpSpec, measure: Callable[[], Outcome | None]) -> Outcome | None:
    """Return what a check finds; an error that the op raises is a failure of the check."""
    try:
        return measure()
    except ERRORS as error:
        return Outcome(False, detail=op_checks.raised(error, spec))


def _accuracy(spec: OpSpec, cases: list[Case], dtype: torch.dtype, backend: Backend) -> dict[str, Outcome]:
    """Return the worst ratio of error to tolerance over all samples, for the forward and for each gradient."""
    worst: dict[str, Outcome] = {}
    for case in cases:
        try:
            got = run(spec, case.sample)
        except ERRORS as problem:
            return {"forward": Outcome(False, detail=f"{case.sample.name}: {op_checks.raised(problem, spec)}")}
        for kind, factor in (("outputs", FORWARD_FACTOR), ("gradients", GRADIENT_FACTOR)):
            ours, truth, same = (getattr(each, kind) for each in (got, case.truth, case.same))
            for name in sorted({*ours, *truth}):
                label = "forward" if kind == "outputs" else f"gradient of {name}"
                if name not in ours or name not in truth:
                    worst[label] = Outcome(False, detail=f"{case.sample.name}: {name} is missing on one side")
                    continue
                if backend == "reference":
                    allowed = _reference_tolerance(dtype)
                else:
                    allowed = factor * relative_error(same[name], truth[name]) + floor_of(dtype)
                error = relative_error(ours[name], truth[name])
                outcome = Outcome(error <= allowed, error, allowed, f"worst on {case.sample.name}")
                if label not in worst or badness(outcome) > badness(worst[label]):
                    worst[label] = outcome
    if cases and spec.differentiable and not any(label.startswith("gradient") for label in worst):
        worst["gradient"] = Outcome(False, detail="no output has a gradient, and the op is declared differentiable")
    return worst


def _reference_tolerance(dtype: torch.dtype) -> float:
    """What the reference may lose against float64: a few hundred roundings of float32, sixteen of a half dtype."""
    return (256 if dtype == torch.float32 else 16) * torch.finfo(dtype).eps


def backends_of(spec: OpSpec, device: torch.device) -> list[Backend]:
    """Return the backends that can run an op here: its kernel if it has one, and its reference."""
    if library_of(spec.name) is None:
        return ["op"]
    return ["compiled", "reference"] if kernel_status(spec.name, device.type).compiled else ["reference"]


def namespace_of(spec: OpSpec) -> str:
    """Return the namespace of an op, which names the library of its kernels."""
    return spec.name.partition("::")[0]


def isas_of(spec: OpSpec, device: torch.device) -> list[str | None]:
    """Return the instruction sets whose kernels of an op differ and run here, the best one first."""
    namespace, _, op = spec.name.partition("::")
    best = loader.cpu_isa(namespace)
    if device.type != "cpu" or best is None:
        return [None]
    levels = ["portable", *(isa for isa in X86_FLAGS if isa != "portable")]
    offered = levels[: levels.index(best) + 1][::-1]
    sources = loader.sources_of(namespace)
    folders = folders_of(sources, op) if sources else []
    if folders and not any(has_vnni(folder) for folder in folders):
        offered = [isa for isa in offered if isa != "avx512vnni"]
    return list(offered)
