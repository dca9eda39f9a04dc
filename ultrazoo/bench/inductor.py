"""torch.compile of the references: what one has without the compiled kernels."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ultrazoo.bench.calls import Call, calls_of
from ultrazoo.bench.session import Bench
from ultrazoo.bench.timing import Case
from ultrazoo.errors import KernelUnavailableError
from ultrazoo.ops import build
from ultrazoo.spec import OpSpec
from ultrazoo.testing.parity import relative_error

TORCH_COMPILE = "torch.compile"


def require_compiler(device: torch.device) -> None:
    """Check that torch.compile can work on a device.

    Raises:
        KernelUnavailableError: It needs a C++ compiler, and there is none.
    """
    if device.type == "cpu":
        try:
            build.find_compiler()
        except build.BuildError as error:
            raise KernelUnavailableError(f"--backend {TORCH_COMPILE}: {error.reason}; {error.fix}") from error


def compiled_reference(bench: Bench, spec: OpSpec, reference: Case) -> Case | None:
    """Compile the mathematics of every operator that a reference calls, since torch.compile does not look into one.

    Args:
        bench: Takes a line on what that took.
        spec: The op.
        reference: Runs the reference once, with gradients if they are wanted.

    Returns:
        A function that does the same work; None if torch fails at it, or what it made computes something else.

    Raises:
        KernelUnavailableError: There is no C++ compiler.
    """
    calls = calls_of(reference, spec.name.partition("::")[0])
    steps = [(compiled(bench, _mathematics(spec, call)), call) for call in calls]
    for step, call in steps:
        if not _agrees(bench, step, call):
            return None

    def run() -> object:
        with torch.no_grad():
            return [step(*call.args) for step, call in steps]

    return run


def compiled(bench: Bench, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return torch.compile of a function for the shapes that it will meet first.

    Raises:
        KernelUnavailableError: There is no C++ compiler.
    """
    require_compiler(bench.device)
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def _mathematics(spec: OpSpec, call: Call) -> Callable[..., Any]:
    """The function ``<operator>_reference`` of the file reference.py beside the op: its default kernel."""
    module = importlib.import_module(f"{spec.op.__module__.rpartition('.')[0]}.reference")
    function: Callable[..., Any] = getattr(module, f"{call.name.partition('::')[2]}_reference")
    return function


def _agrees(bench: Bench, step: Callable[..., Any], call: Call) -> bool:
    """Compile now, and compare: half the digits of the dtype must be the same."""
    begun = time.perf_counter()
    try:
        with torch.no_grad():
            got = step(*call.args)
    except torch._dynamo.exc.TorchDynamoException as error:
        bench.say(f"{TORCH_COMPILE}: {call.name}: left out, torch raised {str(error).strip().splitlines()[0]}")
        return False
    bench.say(f"{TORCH_COMPILE}: {call.name}: compiled in {time.perf_counter() - begun:.1f} s")
    for ours, theirs in zip(_tensors(got), _tensors(call.result), strict=True):
        limit = torch.finfo(theirs.dtype).eps ** 0.5 if theirs.is_floating_point() else 0.0
        off = relative_error(ours, theirs)
        if not off <= limit:
            bench.say(f"{TORCH_COMPILE}: {call.name}: left out, it is off by {off:.2g}, more than {limit:.2g}")
            return False
    return True


def _tensors(values: Any) -> list[Tensor]:
    return list(values) if isinstance(values, tuple | list) else [values]
