"""The parity checks that need no truth: what memory an op reads and writes, and whether it gives the same twice."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.autograd.gradcheck import GradcheckError, gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from ultrazoo.callables import in_one_line, place_in
from ultrazoo.errors import UltrazooError
from ultrazoo.spec import OpSpec, Sample
from ultrazoo.testing.measure import call, floor_of, named_arguments, relative_error, run

GRADCHECK_ELEMENTS = 3000
"""Samples with more input elements than this are left out of gradcheck, whose cost grows with their square."""
ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    UltrazooError,
)
"""What an op may raise that makes a check fail."""


class Outcome(NamedTuple):
    """Whether a check held, with its error and tolerance where it has them."""

    ok: bool
    error: float | None = None
    tolerance: float | None = None
    detail: str = ""


def raised(error: Exception, spec: OpSpec) -> str:
    """Return an error that an op or its reference raised in one line, with the place in its code."""
    told, place = in_one_line(error), place_in(error, spec.op)
    return told if place in told else f"{told} ({place})"


def registration(spec: OpSpec, samples: list[Sample]) -> Outcome:
    """torch's own check of schema, fake kernel and autograd registration, on every operator, backwards included."""
    namespace = spec.name.partition("::")[0]
    for sample in samples:
        with _Recorder(namespace) as recorder:
            run(spec, sample)
        if not recorder.calls:
            return Outcome(False, detail=f"{sample.name}: no operator of {namespace} was called")
        for func, args, kwargs in recorder.calls:
            result = torch.library.opcheck(func, args, kwargs, raise_exception=False)
            failed = {test: outcome for test, outcome in result.items() if outcome != "SUCCESS"}
            if failed:
                return Outcome(False, detail=f"{sample.name}: {func}: {failed}")
    return Outcome(True, detail=f"{len(samples)} samples")


class _Recorder(TorchDispatchMode):
    """Collects the calls of one namespace's operators below autograd."""

    def __init__(self, namespace: str) -> None:
        super().__init__()
        self.namespace = namespace
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == self.namespace:
            copies = tree_map(lambda value: value.detach().clone() if isinstance(value, torch.Tensor) else value, args)
            self.calls.append((func, copies, dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


def memory(spec: OpSpec, samples: list[Sample], dtype: torch.dtype) -> Outcome:
    """Inputs strewn through NaN, or unaligned between NaN, with NaN in all memory that the op allocates."""
    worst, allowed = 0.0, floor_of(dtype)
    for sample in samples:
        plain = run(spec, sample).tensors()
        for place, how in ((_strided, "every second number of"), (_unaligned, "in the middle of")):
            moved = _with_tensors(sample, place)
            with _filled_memory():
                found = run(spec, moved, copy=False).tensors()
            for name, want in plain.items():
                error = relative_error(found[name], want)
                worst = max(worst, error)
                if not error <= allowed:
                    return Outcome(False, error, allowed, f"{sample.name}: {name} changes when inputs are {how} NaN")
    return Outcome(True, worst, allowed, f"{len(samples)} samples")


@contextmanager
def _filled_memory() -> Iterator[None]:
    """Make torch fill every new tensor with NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _with_tensors(sample: Sample, change: Callable[[torch.Tensor], torch.Tensor]) -> Sample:
    def changed(value: Any) -> Any:
        return change(value) if isinstance(value, torch.Tensor) and value.dim() > 0 else value

    kwargs = {name: changed(value) for name, value in sample.kwargs.items()}
    return Sample(name=sample.name, args=tuple(changed(value) for value in sample.args), kwargs=kwargs)


def _strided(value: torch.Tensor) -> torch.Tensor:
    """Return the same numbers at every second place of a buffer of NaN (or of the largest integer)."""
    buffer = _poison((*value.shape[:-1], 2 * value.shape[-1] + 1), value)
    return buffer[..., 1 : 1 + 2 * value.shape[-1] : 2].copy_(value)


def _unaligned(value: torch.Tensor) -> torch.Tensor:
    """Return the same numbers, contiguous, one element past the start of a buffer of NaN that goes on after them."""
    buffer = _poison((value.numel() + 130,), value)
    return buffer[1 : 1 + value.numel()].view(value.shape).copy_(value)


def _poison(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    if like.is_floating_point():
        fill: float | bool = float("nan")
    else:
        fill = True if like.dtype == torch.bool else torch.iinfo(like.dtype).max
    return torch.full(shape, fill, dtype=like.dtype, device=like.device)


def padding(spec: OpSpec, samples: list[Sample]) -> Outcome | None:
    """NaN at padding changes no bit of any output or gradient; None where no sample has padding."""
    checked = 0
    for sample in samples:
        segments = named_arguments(spec, sample).get("segments")
        if segments is None or not (segments == 0).any():
            continue
        checked += 1

        dirty = _with_tensors(sample, functools.partial(_spoiled, segments))
        plain, found = run(spec, sample).tensors(), run(spec, dirty).tensors()
        for name, want in plain.items():
            if not torch.equal(found[name], want):
                return Outcome(False, detail=f"{sample.name}: {name} depends on what stands at padding")
    return Outcome(True, detail=f"{checked} samples") if checked else None


def documents(spec: OpSpec, samples: list[Sample]) -> Outcome | None:
    """A document that returns after another one is an error; None where no sample has two tokens of segments."""
    checked = 0
    for sample in samples:
        segments = named_arguments(spec, sample).get("segments")
        if segments is None or segments.shape[0] == 0 or segments.shape[1] < 3:
            continue
        checked += 1
        returning = (torch.arange(segments.shape[1], device=segments.device) % 2 + 1).expand_as(segments)
        with contextlib.suppress(ValueError, RuntimeError):
            run(spec, with_segments(spec, sample, returning.to(segments.dtype).contiguous()))
            return Outcome(False, detail=f"{sample.name}: segments 1, 2, 1, ... are accepted, expected an error")
    return Outcome(True, detail=f"{checked} samples") if checked else None


def with_segments(spec: OpSpec, sample: Sample, segments: torch.Tensor) -> Sample:
    """Return the sample with other segments."""
    before = named_arguments(spec, sample)["segments"]
    kwargs = {name: segments if value is before else value for name, value in sample.kwargs.items()}
    return replace(sample, args=tuple(segments if value is before else value for value in sample.args), kwargs=kwargs)


def _spoiled(segments: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return a per-token tensor (B, L, ...) with NaN at padding."""
    if not value.is_floating_point() or value.shape[:2] != segments.shape:
        return value
    return value.masked_fill(segments.eq(0).reshape(*segments.shape, *[1] * (value.dim() - 2)), float("nan"))


def unmodified(spec: OpSpec, samples: list[Sample]) -> Outcome:
    """No input is written, by the forward or the backward."""
    for sample in samples:
        tensors = [value for value in (*sample.args, *sample.kwargs.values()) if isinstance(value, torch.Tensor)]
        before = [(value.clone(), value._version) for value in tensors]
        run(spec, sample, copy=False)
        for value, (copy, version) in zip(tensors, before, strict=True):
            same = torch.equal(torch.nan_to_num(value.double()), torch.nan_to_num(copy.double()))
            if not same or value._version != version:
                return Outcome(False, detail=f"{sample.name}: an input of shape {tuple(value.shape)} was written")
    return Outcome(True, detail=f"{len(samples)} samples")


def repeatable(spec: OpSpec, samples: list[Sample]) -> Outcome:
    """Two runs give the same bits."""
    for sample in samples:
        first, second = run(spec, sample).tensors(), run(spec, sample).tensors()
        for name, value in first.items():
            if not torch.equal(value, second[name]):
                return Outcome(False, detail=f"{sample.name}: {name} differs between two runs")
    return Outcome(True, detail=f"{len(samples)} samples")


def same_by_any_threads(spec: OpSpec, samples: list[Sample]) -> Outcome:
    """One thread, two and five give the same bits in the forward."""
    before = torch.get_num_threads()
    try:
        for sample in samples:
            outputs = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                outputs.append(run(spec, sample).outputs)
            for name, value in outputs[0].items():
                if not all(torch.equal(value, other[name]) for other in outputs[1:]):
                    return Outcome(False, detail=f"{sample.name}: {name} depends on the number of threads")
    finally:
        torch.set_num_threads(before)
    return Outcome(True, detail=f"{len(samples)} samples by 1, 2 and 5 threads")


def derivatives(spec: OpSpec, samples: list[Sample]) -> Outcome:
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
        try:
            gradcheck(function, inputs, eps=1e-6, atol=1e-6, rtol=1e-4, fast_mode=True)
        except GradcheckError as error:
            return Outcome(False, detail=f"{sample.name}: {str(error).splitlines()[0]}")
        checked += 1
    return Outcome(checked > 0, detail=f"{checked} samples of at most {GRADCHECK_ELEMENTS} elements")
