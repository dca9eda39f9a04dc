"""Holds every compiled kernel to its reference, on this machine.

The truth is the reference in float64. A kernel passes when its error is at most twice the error of the reference run in
the kernel's own dtype (three times for gradients) plus a floor of two roundings of that dtype: no tolerance is tuned
for an op. Errors are the largest absolute difference over the largest absolute value of the truth.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.gradcheck import GradcheckError, gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from ultrazoo.errors import KernelUnavailableError, UnknownNameError
from ultrazoo.ops.library import Policy, kernel_policy, kernel_status
from ultrazoo.spec import OpSpec, Sample

FORWARD_FACTOR = 2.0
GRADIENT_FACTOR = 3.0
FLOOR_ROUNDINGS = 2.0
GRADCHECK_ELEMENTS = 3000
"""Samples with more input elements than this are left out of gradcheck, whose cost grows with their square."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One verdict: what was held to what, the error and the tolerance where the check has them."""

    subject: str
    """An op by its full name, or a block."""
    device: str
    dtype: str
    backend: str
    check: str
    ok: bool
    error: float | None = None
    tolerance: float | None = None
    detail: str = ""


@dataclass(frozen=True)
class Run:
    """Outputs of one call and the gradients of its differentiable inputs, by name."""

    outputs: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]


def check_op(spec: OpSpec, device: torch.device, dtype: torch.dtype, backend: Policy) -> Iterator[Check]:
    """Yield every verdict on one op, dtype and backend (``compiled`` or ``reference``)."""

    def verdict(
        check: str, ok: bool, error: float | None = None, tolerance: float | None = None, detail: str = ""
    ) -> Check:
        return Check(
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

    if backend == "compiled":
        status = kernel_status(spec.name, device.type)
        yield verdict("kernel exists", status.compiled, detail=status.detail)
        if not status.compiled:
            return
    samples = list(spec.samples(device, dtype))
    with kernel_policy(backend):
        yield verdict("opcheck", *_opcheck(spec, samples))
        yield from _accuracy(spec, samples, dtype, backend, verdict)
        yield verdict("strides and poisoned memory", *_poisoned(spec, samples, dtype))
        yield verdict("inputs unmodified", *_unmodified(spec, samples))
        yield verdict("reruns bit-equal", *_deterministic(spec, samples))
    exact = spec.differentiable and not spec.straight_through
    if backend == "reference" and exact and dtype == torch.float32:
        yield verdict("gradcheck in float64", *_gradcheck(spec, samples))


def run(spec: OpSpec, sample: Sample, dtype: torch.dtype | None = None, *, copy: bool = True) -> Run:
    """Call an op and differentiate a fixed weighted sum of its outputs.

    Args:
        spec: The op.
        sample: Its arguments.
        dtype: Turn floating-point tensors into this dtype first; None keeps them.
        copy: Work on contiguous copies; False takes the sample's own tensors, whose strides then count.
    """
    given = named_arguments(spec, sample)
    for name, value in given.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            constant = name in spec.constants
            kept = value.dtype if constant else dtype or value.dtype
            fresh = value.detach().to(kept).clone(memory_format=torch.contiguous_format)
            wanted = spec.differentiable and not constant
            given[name] = (fresh if copy else value.detach()).requires_grad_(wanted)
    outputs = _named(call(spec, given))
    wrt = {name: value for name, value in given.items() if isinstance(value, torch.Tensor) and value.requires_grad}
    targets = [output for output in outputs.values() if output.requires_grad]
    gradients: dict[str, torch.Tensor] = {}
    if targets:
        total = torch.stack([(output.double() * _cotangent(output)).sum() for output in targets]).sum()
        found = torch.autograd.grad(total, list(wrt.values()), allow_unused=True)
        gradients = {name: grad for name, grad in zip(wrt, found, strict=True) if grad is not None}
    return Run({name: output.detach() for name, output in outputs.items()}, gradients)


def named_arguments(spec: OpSpec, sample: Sample) -> dict[str, Any]:
    """The arguments of a call by the names that the public function gives them."""
    return dict(inspect.signature(spec.op).bind(*sample.args, **sample.kwargs).arguments)


def call(spec: OpSpec, arguments: dict[str, Any]) -> Any:
    """Call the public function with named arguments, positional ones first."""
    bound = inspect.signature(spec.op).bind_partial()
    bound.arguments.update(arguments)
    return spec.op(*bound.args, **bound.kwargs)


def _named(outputs: Any) -> dict[str, torch.Tensor]:
    values = outputs if isinstance(outputs, tuple | list) else (outputs,)
    return {f"output{i}" if len(values) > 1 else "output": value for i, value in enumerate(values)}


def _cotangent(output: torch.Tensor) -> torch.Tensor:
    """A fixed weight per element, the same for every dtype and backend; its mean keeps sums from cancelling out."""
    index = torch.arange(output.numel(), device=output.device, dtype=torch.float64)
    return (1.25 + torch.cos(0.7 * index + 0.3)).reshape(output.shape)


def relative_error(got: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest absolute difference over the largest absolute truth; infinite where one is not finite and differs."""
    if got.numel() == 0:
        return 0.0
    difference = (got.double() - truth.double()).abs()
    difference = torch.where(got.double() == truth.double(), 0.0, difference)
    error, scale = float(difference.max()), float(truth.double().abs().max())
    if error != error:
        return float("inf")
    return error / scale if scale > 0 else error


def floor_of(dtype: torch.dtype) -> float:
    """The error that is always allowed: two roundings of the dtype."""
    return FLOOR_ROUNDINGS * torch.finfo(dtype).eps


def _accuracy(
    spec: OpSpec, samples: list[Sample], dtype: torch.dtype, backend: Policy, verdict: Callable[..., Check]
) -> Iterator[Check]:
    """The worst ratio of error to tolerance over all samples, for the forward and for each gradient."""
    worst: dict[str, tuple[float, float, float, str]] = {}
    for sample in samples:
        got = run(spec, sample)
        with kernel_policy("reference"):
            truth, same = run(spec, sample, torch.float64), run(spec, sample)
        for kind, factor in (("outputs", FORWARD_FACTOR), ("gradients", GRADIENT_FACTOR)):
            expected = getattr(truth, kind)
            if set(getattr(got, kind)) != set(expected):
                names = sorted(set(expected) ^ set(getattr(got, kind)))
                worst[kind] = (float("inf"), float("inf"), 0.0, f"{sample.name}: {names} missing on one side")
                continue
            for name, want in expected.items():
                error = relative_error(getattr(got, kind)[name], want)
                allowed = factor * relative_error(getattr(same, kind)[name], want) + floor_of(dtype)
                if backend == "reference":
                    allowed = _reference_tolerance(dtype)
                label = "forward" if kind == "outputs" else f"gradient of {name}"
                ratio = error / allowed
                if label not in worst or not ratio <= worst[label][0]:
                    worst[label] = (ratio, error, allowed, sample.name)
    for label, (ratio, error, allowed, name) in worst.items():
        yield verdict(label, ratio <= 1.0, error, allowed, f"worst on {name}")


def _reference_tolerance(dtype: torch.dtype) -> float:
    """What the reference may lose against float64: a few hundred roundings of float32, sixteen of a half dtype."""
    return (256 if dtype == torch.float32 else 16) * torch.finfo(dtype).eps


class _Recorder(TorchDispatchMode):
    """Collects the calls of ultrazoo's and plugins' operators below autograd."""

    def __init__(self, namespace: str) -> None:
        super().__init__()
        self.namespace = namespace
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == self.namespace:
            copies = tree_map(lambda value: value.detach().clone() if isinstance(value, torch.Tensor) else value, args)
            self.calls.append((func, copies, dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


def _opcheck(spec: OpSpec, samples: list[Sample]) -> tuple[bool, None, None, str]:
    """torch's own check of schema, fake kernel and autograd registration, on every operator that the samples call."""
    for sample in samples:
        with _Recorder(spec.name.partition("::")[0]) as recorder:
            spec.op(*sample.args, **sample.kwargs)
        if not recorder.calls:
            return False, None, None, f"{sample.name}: no operator of {spec.name.partition('::')[0]} was called"
        for func, args, kwargs in recorder.calls:
            result = torch.library.opcheck(func, args, kwargs, raise_exception=False)
            failed = {test: outcome for test, outcome in result.items() if outcome != "SUCCESS"}
            if failed:
                return False, None, None, f"{sample.name}: {func}: {failed}"
    return True, None, None, f"{len(samples)} samples"


def _poisoned(spec: OpSpec, samples: list[Sample], dtype: torch.dtype) -> tuple[bool, float | None, float | None, str]:
    """Every other element of a NaN-filled buffer as input, and NaN in all memory that the op allocates."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    worst = 0.0
    for sample in samples:
        plain = run(spec, sample)
        strided = Sample(
            name=sample.name,
            args=tuple(_strided(value) for value in sample.args),
            kwargs={name: _strided(value) for name, value in sample.kwargs.items()},
        )
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            spread = run(spec, strided, copy=False)
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        for kind in ("outputs", "gradients"):
            for name, want in getattr(plain, kind).items():
                error = relative_error(getattr(spread, kind)[name], want)
                worst = max(worst, error)
                if not error <= floor_of(dtype):
                    return (
                        False,
                        error,
                        floor_of(dtype),
                        f"{sample.name}: {kind} of {name} change with the memory around",
                    )
    return True, worst, floor_of(dtype), f"{len(samples)} samples"


def _strided(value: Any) -> Any:
    """The same numbers at every second place of a buffer of NaN (or of a large integer)."""
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        return value
    poison = (
        float("nan")
        if value.is_floating_point()
        else torch.iinfo(value.dtype).max
        if value.dtype != torch.bool
        else True
    )
    buffer = torch.full((*value.shape[:-1], 2 * value.shape[-1] + 1), poison, dtype=value.dtype, device=value.device)
    view = buffer[..., 1 : 1 + 2 * value.shape[-1] : 2]
    view.copy_(value)
    return view


def _unmodified(spec: OpSpec, samples: list[Sample]) -> tuple[bool, None, None, str]:
    for sample in samples:
        tensors = [value for value in (*sample.args, *sample.kwargs.values()) if isinstance(value, torch.Tensor)]
        before = [(value.clone(), value._version) for value in tensors]
        run(spec, sample)
        spec.op(*sample.args, **sample.kwargs)
        for value, (copy, version) in zip(tensors, before, strict=True):
            same = torch.equal(torch.nan_to_num(value.double()), torch.nan_to_num(copy.double()))
            if not same or value._version != version:
                return False, None, None, f"{sample.name}: an input of shape {tuple(value.shape)} was written"
    return True, None, None, f"{len(samples)} samples"


def _deterministic(spec: OpSpec, samples: list[Sample]) -> tuple[bool, None, None, str]:
    for sample in samples:
        first, second = run(spec, sample), run(spec, sample)
        for kind in ("outputs", "gradients"):
            for name, value in getattr(first, kind).items():
                if not torch.equal(value, getattr(second, kind)[name]):
                    return False, None, None, f"{sample.name}: {name} differs between two runs"
    return True, None, None, f"{len(samples)} samples"


def _gradcheck(spec: OpSpec, samples: list[Sample]) -> tuple[bool, None, None, str]:
    """torch's finite differences against the backward formula, in float64, on the small samples."""
    checked = 0
    for sample in samples:
        given = named_arguments(spec, sample)
        size = sum(value.numel() for value in given.values() if isinstance(value, torch.Tensor))
        if not 0 < size <= GRADCHECK_ELEMENTS:
            continue
        given = {
            name: value.detach().double().clone()
            if isinstance(value, torch.Tensor) and value.is_floating_point() and name not in spec.constants
            else value
            for name, value in given.items()
        }
        wrt = list(run(spec, sample).gradients)

        def function(*tensors: torch.Tensor, given: Any = given, wrt: list[str] = wrt) -> Any:
            return call(spec, {**given, **dict(zip(wrt, tensors, strict=True))})

        inputs = [given[name].requires_grad_() for name in wrt]
        with kernel_policy("reference"):
            try:
                gradcheck(function, inputs, eps=1e-6, atol=1e-6, rtol=1e-4, fast_mode=True)
            except GradcheckError as error:
                return False, None, None, f"{sample.name}: {str(error).splitlines()[0]}"
        checked += 1
    return checked > 0, None, None, f"{checked} samples of at most {GRADCHECK_ELEMENTS} elements"


def backends_of(spec: OpSpec, device: torch.device) -> list[Policy]:
    """The backends that can run an op here; the reference always can."""
    try:
        compiled = kernel_status(spec.name, device.type).compiled
    except (KernelUnavailableError, UnknownNameError):  # an op of a plugin may have kernels of its own, or none
        compiled = False
    return ["compiled", "reference"] if compiled else ["reference"]
