"""Calls of an op, their gradients, and how far two of them are apart: what the parity checks are made of."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ultrazoo.spec import OpSpec, Sample

FORWARD_FACTOR = 2.0
GRADIENT_FACTOR = 3.0
FLOOR_ROUNDINGS = 2.0


class HasError(Protocol):
    """What has an error and a tolerance."""

    @property
    def error(self) -> float | None: ...

    @property
    def tolerance(self) -> float | None: ...


@dataclass(frozen=True, kw_only=True)
class Check:
    """One verdict: what was held to what, the error and the tolerance where the check has them."""

    subject: str
    """An op by its full name, or a block."""
    device: str
    dtype: str
    backend: str
    """``compiled``, ``reference``, or ``op`` for an op of a plugin, which picks its kernel by itself."""
    check: str
    ok: bool
    error: float | None = None
    tolerance: float | None = None
    detail: str = ""
    isa: str = ""
    """The instruction set of compiled CPU kernels."""


@dataclass(frozen=True)
class Run:
    """Outputs of one call and the gradients of its differentiable inputs, by name."""

    outputs: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all of them, by names that tell."""
        return {**self.outputs, **{f"gradient of {name}": value for name, value in self.gradients.items()}}


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
    """Return the arguments of a call by the names that the public function gives them."""
    return dict(inspect.signature(spec.op).bind(*sample.args, **sample.kwargs).arguments)


def call(spec: OpSpec, arguments: dict[str, Any]) -> Any:
    """Call the public function with named arguments, positional ones first."""
    bound = inspect.signature(spec.op).bind_partial()
    bound.arguments.update(arguments)
    return spec.op(*bound.args, **bound.kwargs)


def relative_error(got: torch.Tensor, truth: torch.Tensor) -> float:
    """Return the largest absolute difference over the largest absolute truth.

    It is infinite where one side is not finite and the other differs.
    """
    if got.numel() == 0:
        return 0.0
    difference = (got.double() - truth.double()).abs()
    difference = torch.where(got.double() == truth.double(), 0.0, difference)
    error, scale = float(difference.max()), float(truth.double().abs().max())
    if error != error:
        return float("inf")
    return error / scale if scale > 0 else error


def badness(check: HasError) -> float:
    """Return the share of its tolerance that a check used; infinite for one that could not be measured."""
    if check.error is None or check.tolerance is None:
        return float("inf")
    return check.error / check.tolerance if check.tolerance > 0 else float("inf")


def floor_of(dtype: torch.dtype) -> float:
    """Return the error that is always allowed: two roundings of the dtype."""
    return FLOOR_ROUNDINGS * torch.finfo(dtype).eps


def _named(outputs: Any) -> dict[str, torch.Tensor]:
    values = outputs if isinstance(outputs, tuple | list) else (outputs,)
    return {f"output{i}" if len(values) > 1 else "output": value for i, value in enumerate(values)}


def _cotangent(output: torch.Tensor) -> torch.Tensor:
    """Return a fixed weight per element, the same for every backend; its mean keeps sums from cancelling out."""
    index = torch.arange(output.numel(), device=output.device, dtype=torch.float64)
    return (1.25 + torch.cos(0.7 * index + 0.3)).reshape(output.shape)
