"""The laws on compiled kernels: what a law computes in fp32 is compared with the same law on references in fp64.

The tolerance is that of parity: a kernel's error is at most twice the largest error that the references have in fp32
anywhere in the same law (three times for gradients), plus two roundings of fp32. Limits of 0, such as those of outputs
at padding, stay 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ultrazoo.ops.library import get_kernel_policy, kernel_policy, kernel_status
from ultrazoo.ops.policy import Policy
from ultrazoo.spec import BlockSpec
from ultrazoo.testing.law_kit import MEASURES, Check, LawResult, Subject, judge
from ultrazoo.testing.laws import laws_of
from ultrazoo.testing.measure import FORWARD_FACTOR, GRADIENT_FACTOR, floor_of, relative_error
from ultrazoo.testing.model_parity import with_kernels

CPU = torch.device("cpu")
IN_HALF = ("bf16", "fp16")
"""Laws that run the kernels already."""


def kernels_of(ops: Sequence[str]) -> tuple[Policy | None, str]:
    """Return the kernel policy that runs every kernel that some ops should have on the CPU; or None, and why.

    Args:
        ops: Full names.
    """
    if get_kernel_policy() == "reference":
        return None, "the kernel policy is reference"
    proved = with_kernels(ops, CPU)
    if not proved:
        return None, "no op has kernels"
    for op in proved:
        status = kernel_status(op, "cpu")
        if not status.compiled:
            return None, f"{op} has no compiled kernel here: {status.detail}; {status.fix}"
    return ("compiled" if len(proved) == len(ops) else "auto"), ""


def compiled_laws_of(spec: BlockSpec, *, quick: bool) -> tuple[str, ...]:
    """Return the names of the laws to measure on the kernels of a block's ops.

    Args:
        spec: The block; without ops it has none.
        quick: Leave out the one that compiles.
    """
    left_out = (*IN_HALF, "compile") if quick else IN_HALF
    return tuple(name for name in laws_of(spec.kind) if name not in left_out) if spec.ops else ()


def hold_on_kernels(name: str, spec: BlockSpec, options: Mapping[str, Any], policy: Policy) -> LawResult:
    """Measure a law of a block on the compiled kernels of its ops.

    Args:
        name: From ``LAWS``.
        spec: The block.
        options: Fields of its config that differ from the tiny defaults.
        policy: Of ``kernels_of``.

    Raises:
        LawViolation: The law is broken.
    """

    def measure(policy: Policy, dtype: torch.dtype) -> list[Check]:
        with kernel_policy(policy):
            return list(MEASURES[name](Subject(spec, options, dtype)))

    return judge(name, spec, lambda: against_references(measure, policy))


def against_references(measure: Callable[[Policy, torch.dtype], Iterable[Check]], policy: Policy) -> Iterator[Check]:
    """Yield the checks of a law in fp32 under a kernel policy, what it computed compared with the references.

    Args:
        measure: Runs the law; it yields the same checks, in the same order, whatever the policy and the dtype.
        policy: Of the kernels.
    """
    truth = list(measure("reference", torch.float64))
    same = list(measure("reference", torch.float32))
    allowed = {
        gradient: factor
        * max((_error(a, b) for a, b in zip(same, truth, strict=True) if a.gradient == gradient), default=0.0)
        + floor_of(torch.float32)
        for gradient, factor in ((False, FORWARD_FACTOR), (True, GRADIENT_FACTOR))
    }
    for found, true in zip(measure(policy, torch.float32), truth, strict=True):
        if found.compared:
            what = f"{found.what.partition(': derivative')[0]}: error of the kernel in fp32"
            yield Check(what, _error(found, true), allowed[found.gradient])
        if not found.compared or (found.limit == 0 and not found.at_least):
            yield found


def _error(found: Check, truth: Check) -> float:
    return max((_apart(a, b) for a, b in zip(found.compared, truth.compared, strict=True)), default=0.0)


def _apart(got: Tensor, truth: Tensor) -> float:
    return relative_error(got, truth) if got.shape == truth.shape else float("inf")
