"""Times an op: its compiled kernel, its reference, torch.compile of that, and the baselines that the spec names."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ultrazoo.bench import inductor
from ultrazoo.bench.calls import calls_of
from ultrazoo.bench.gate import kernel_of, require_parity
from ultrazoo.bench.records import Task
from ultrazoo.bench.session import Bench
from ultrazoo.bench.timing import Case
from ultrazoo.errors import ConfigError, KernelUnavailableError
from ultrazoo.ops import kernel_policy
from ultrazoo.spec import Cost, OpSpec, Sample

BACKWARD_WORK = 3.0
"""Work of a forward and a backward in forwards, by the usual count: two products for each one of the forward."""
LENGTH = re.compile(r"\bL(\d+)\b")


def bench_op(bench: Bench, spec: OpSpec, lengths: Sequence[int] | None = None) -> None:
    """Check parity, then time every bench sample of an op, or one of each kind at the lengths given.

    Raises:
        ParityError: The op does not compute what its reference computes.
        ConfigError: The op has no samples by length, or no backward.
    """
    samples = list(samples_of(spec, bench.device, bench.dtype, lengths))
    bench.check_backends(backend_names(spec, bench))
    bench.parity += require_parity([spec], bench.device, bench.dtype, bench.say)
    for sample in samples:
        time_sample(bench, spec, sample)


def backend_names(spec: OpSpec, bench: Bench) -> tuple[str, ...]:
    """Return every backend that an op can be asked for, and check that it can be timed in the direction wanted."""
    if bench.backward and not spec.differentiable:
        raise ConfigError(f"--backward: {spec.name} has no gradient; leave it out")
    own = "op" if kernel_of(spec, bench.device) is None else "compiled"
    return (own, "reference", inductor.TORCH_COMPILE, *spec.baselines)


def samples_of(
    spec: OpSpec, device: torch.device, dtype: torch.dtype, lengths: Sequence[int] | None
) -> Iterator[Sample]:
    """Yield the bench samples; with lengths, one of each family of samples that come in several, at each length.

    Raises:
        ConfigError: Lengths are given, and no sample has one.
    """
    if lengths is None:
        yield from spec.bench_samples(device, dtype)
        return
    families: dict[str, list[Sample]] = {}
    for sample in spec.bench_samples(device, dtype):
        if length_of(sample) is not None:
            families.setdefault(family_of(sample), []).append(sample)
    if not families:
        raise ConfigError(f"--sweep, --length: the samples of {spec.name} have no length; leave these options out")
    several = [samples[0] for samples in families.values() if len(samples) > 1]
    for sample in several or [samples[0] for samples in families.values()]:
        for length in lengths:
            yield at_length(sample, length)


def length_of(sample: Sample) -> int | None:
    """Return the L of a sample's name, as in ``B4 H8 L1024``."""
    found = LENGTH.search(sample.name)
    return int(found[1]) if found else None


def family_of(sample: Sample) -> str:
    """Return a sample's name without its length."""
    return " ".join(LENGTH.sub("", sample.name).split())


def at_length(sample: Sample, length: int) -> Sample:
    """Return the sample at another length, its tensors (B, L, ...) cut or repeated along L."""
    lead = _tensors(sample)[0]
    before = length_of(sample)

    def resized(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() > 1 and value.shape[:2] == lead.shape[:2]:
            return value[:, torch.arange(length, device=value.device) % value.shape[1]]
        return value

    return Sample(
        name=LENGTH.sub(f"L{length}", sample.name) if before is not None else f"{sample.name} L{length}",
        args=tuple(resized(value) for value in sample.args),
        kwargs={name: resized(value) for name, value in sample.kwargs.items()},
    )


def time_sample(bench: Bench, spec: OpSpec, sample: Sample, family: str | None = None) -> None:
    """Time one call of an op by every backend that is wanted."""
    lead = _tensors(sample)[0]
    cost = spec.cost(sample)
    work = BACKWARD_WORK if bench.backward else 1.0
    task = Task(
        kind="op",
        name=spec.name,
        sample=sample.name,
        direction=bench.direction,
        tokens=lead.shape[:-1].numel() if lead.dim() < 3 else lead.shape[0] * lead.shape[1],
        batch=lead.shape[0] if lead.dim() > 2 else None,
        length=length_of(sample),
        cost=Cost(flops=work * cost.flops, bytes=work * cost.bytes),
    )
    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(bench.backward))
        status = kernel_of(spec, bench.device)
        if status is not None and status.compiled:
            stack.enter_context(kernel_policy("compiled"))
        bench.measure(task, f"{spec.name} {family or family_of(sample)}", ways(bench, spec, sample))


def ways(bench: Bench, spec: OpSpec, sample: Sample) -> dict[str, Case]:
    """Return backend -> function that calls an op once on a sample, for every backend that is wanted.

    The compiled kernels run only under the kernel policy ``compiled`` or ``auto``.

    Raises:
        KernelUnavailableError: A backend was asked for by name and cannot run here.
    """
    status = kernel_of(spec, bench.device)
    functions: dict[str, Callable[..., Any]] = {}
    if status is None:
        functions["op"] = spec.op
    elif status.compiled:
        functions["compiled"] = spec.op
    else:
        reason = f"{spec.name}: compiled: {status.detail.splitlines()[0]}; {status.fix}"
        if bench.backends and "compiled" in bench.backends:
            raise KernelUnavailableError(reason)
        bench.tell_once(f"{reason}; timed without it")
    functions |= {"reference": spec.reference, **spec.baselines}
    cases = {name: _case(bench, spec, function, sample) for name, function in functions.items() if bench.wants(name)}
    if bench.wants(inductor.TORCH_COMPILE, default=False):
        cases |= _torch_compile(bench, spec, sample)
    return cases


def _torch_compile(bench: Bench, spec: OpSpec, sample: Sample) -> dict[str, Case]:
    """torch.compile of the reference; nothing if torch failed at it, which has been said."""
    reference = _case(bench, spec, spec.reference, sample)
    if calls_of(reference, spec.name.partition("::")[0]):
        case = inductor.compiled_reference(bench, spec, reference)
    else:
        case = _case(bench, spec, inductor.compiled(bench, spec.reference), sample)
    return {} if case is None else {inductor.TORCH_COMPILE: case}


def _case(bench: Bench, spec: OpSpec, function: Callable[..., Any], sample: Sample) -> Case:
    """A function without arguments that calls another one on a sample, with the gradients if they are wanted."""
    if not bench.backward:
        return lambda: function(*sample.args, **sample.kwargs)
    bound = inspect.signature(spec.op).bind(*sample.args, **sample.kwargs)
    wrt = []
    for name, value in bound.arguments.items():
        if isinstance(value, Tensor) and value.is_floating_point() and name not in spec.constants:
            bound.arguments[name] = value.detach().requires_grad_()
            wrt.append(bound.arguments[name])
    args, kwargs = bound.args, bound.kwargs
    return differentiated(lambda: function(*args, **kwargs), wrt)


def differentiated(forward: Callable[[], Any], wrt: Sequence[Tensor]) -> Case:
    """Return a function that runs ``forward`` and takes the gradients of its first output, at a fixed weight."""
    weight: list[Tensor] = []

    def case() -> object:
        outputs = forward()
        y = outputs[0] if isinstance(outputs, tuple | list) else outputs
        if not weight:
            weight.append(torch.randn(y.shape, dtype=torch.float32).to(y.device, y.dtype))
        return torch.autograd.grad(y, wrt, weight[0], allow_unused=True)

    return case


def _tensors(sample: Sample) -> list[Tensor]:
    return [value for value in (*sample.args, *sample.kwargs.values()) if isinstance(value, Tensor)]
