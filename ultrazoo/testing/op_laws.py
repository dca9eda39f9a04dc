"""The laws of documents for an op with ``segments``, on calls made from its samples.

The samples give shapes, options and numbers; the documents, the padding and the rubbish at padding are the law's own.
So a fault at a border of documents shows even if no sample has one.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ultrazoo.ops.library import kernel_policy
from ultrazoo.ops.policy import Policy
from ultrazoo.spec import OpSpec, Sample
from ultrazoo.testing.kernel_laws import against_references
from ultrazoo.testing.law_kit import Check, difference
from ultrazoo.testing.measure import Run, run
from ultrazoo.testing.sample_rules import RANDOM, Call, Layout, calls_of_samples, layout_of

CPU = torch.device("cpu")
LONGEST, ROWS = 48, 3
"""Tokens of a row, and rows whose documents are run alone."""
PARTS = (2, 1, 4, 3, 1, 9)
"""Lengths of the documents of a row, again and again."""


@dataclass(frozen=True)
class OpSubject:
    """An op with calls that have several tokens in a row, one for each set of options among its samples."""

    spec: OpSpec
    function: Callable[..., Any]
    """The op, or its reference."""
    layout: Layout
    calls: tuple[Call, ...]

    def run(self, call: Call, **changes: Any) -> Run:
        """Run a call, with some of its arguments changed."""
        bound = inspect.signature(self.spec.op).bind_partial()
        bound.arguments.update({**call, **changes})
        return run(replace(self.spec, op=self.function), Sample(name="", args=bound.args, kwargs=bound.kwargs))

    def at(self, call: Call, change: Callable[[Tensor], Tensor]) -> Call:
        """Return a call with a change of every argument that has a number for each token."""
        return {
            name: change(value) if name in self.layout.per_token and value is not None else value
            for name, value in call.items()
        }


def subject_of(spec: OpSpec, function: Callable[..., Any], dtype: torch.dtype) -> OpSubject:
    """Make the calls of an op with ``segments`` from its samples.

    Args:
        spec: The op.
        function: What to call: the op, or its reference.
        dtype: Of the floating-point arguments.

    Raises:
        ValueError: No sample has several tokens in a row.
    """
    calls = calls_of_samples(spec, list(spec.samples(CPU, torch.float32)))
    layout = layout_of(spec, calls) if calls else Layout("", True, ())
    chosen: dict[tuple[Any, ...], Call] = {}
    for call in calls:
        rows, length = layout.tokens(call)
        if rows and length > 1 and layout.fits(call) and call[layout.lead].numel() > 0:
            key = tuple(value is None if isinstance(value, Tensor | None) else value for value in call.values())
            before = chosen.get(key)
            if before is None or before[layout.lead].numel() < call[layout.lead].numel():
                chosen[key] = call
    if not chosen:
        raise ValueError(f"{spec.name}: no sample has several tokens in a row: nothing to make documents of")
    draw = torch.Generator().manual_seed(0)
    subject = OpSubject(spec, function, layout, ())
    varied = (subject.at(call, functools.partial(_varied, draw)) for call in chosen.values())
    return replace(subject, calls=tuple({**_in_dtype(spec, call, dtype), "segments": None} for call in varied))


def _varied(draw: torch.Generator, x: Tensor) -> Tensor:
    """Shorten the rows, and scale each number by 0.5 to 1: no two tokens are alike then, and none leaves its range."""
    x = x[:, :LONGEST]
    return x * (0.5 + 0.5 * torch.rand(x.shape, generator=draw)).to(x.dtype)


def _in_dtype(spec: OpSpec, call: Call, dtype: torch.dtype) -> Call:
    return {
        name: value.to(dtype)
        if isinstance(value, Tensor) and value.is_floating_point() and name not in spec.constants
        else value
        for name, value in call.items()
    }


def documents(rows: int, length: int) -> Tensor:
    """Lay out (rows, length) segments: other documents of 1 to 9 tokens in each row, and padding in places."""
    segments = torch.zeros(rows, length, dtype=torch.int64)
    for row in range(rows):
        start, number = row % 2, row  # every second row begins with padding
        while start < length:
            stop = start + PARTS[number % len(PARTS)]
            segments[row, start:stop] = number + 1
            start, number = stop + (number % 4 == 3), number + 1
        if length > 3 and row % 3 == 0:
            segments[row, -1] = 0
    return segments


def _spans(segments: Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield row, start and stop of each document."""
    for row, numbers in enumerate(segments.tolist()):
        starts = [i for i, n in enumerate(numbers) if i == 0 or n != numbers[i - 1]]
        for start, stop in zip(starts, [*starts[1:], len(numbers)], strict=True):
            if numbers[start]:
                yield row, start, stop


def packing(subject: OpSubject) -> Iterator[Check]:
    """Documents packed in a row with padding give what each gives alone."""
    for call in subject.calls:
        rows, length = subject.layout.tokens(call)
        segments = documents(rows, length)
        found = subject.run(call, segments=segments)
        if all(call.get(name) is None for name in RANDOM):  # random numbers depend on the place in the row
            for row, start, stop in _spans(segments[:ROWS]):
                alone = subject.run(_cut(subject, call, row, start, stop))
                what = f"document of {stop - start} tokens at {start} of row {row}: packed against alone"
                for key, output in _per_token(found, rows, length):
                    yield difference(what, output[row : row + 1, start:stop], alone.outputs[key])
        yield from _everything("documents packed in a row", found)


def _cut(subject: OpSubject, call: Call, row: int, start: int, stop: int) -> Call:
    return subject.at(call, lambda x: x[row : row + 1, start:stop].contiguous())


def padding(subject: OpSubject) -> Iterator[Check]:
    """What is at padding changes nothing at the tokens of documents, and padding belongs to no document."""
    for call in subject.calls:
        rows, length = subject.layout.tokens(call)
        segments = torch.ones(rows, length, dtype=torch.int64)
        for row in range(rows):
            segments[row, : row % 2] = 0
            segments[row, max(1 + row % 2, length - 1 - row) :] = 0
        plain = subject.run(call, segments=segments)
        rubbish = subject.at(call, lambda x, s=segments: torch.where(_like(s.eq(0), x), 1e3 * x, x))  # type: ignore[misc]
        dirty = subject.run(rubbish, segments=segments)
        for key, output in _per_token(dirty, rows, length):
            kept = segments.ne(0)
            yield difference(
                "tokens of documents, with other numbers at padding", output[kept], plain.outputs[key][kept]
            )
        yield from _everything("padded rows", plain)
        yield from _everything("padded rows, large numbers at padding", dirty)


def batch_order(subject: OpSubject) -> Iterator[Check]:
    """A row's output depends neither on its place in the batch nor on the other rows."""
    for call in subject.calls:
        rows, length = subject.layout.tokens(call)
        segments, order = documents(rows, length), torch.arange(rows).roll(1)
        found = subject.run(call, segments=segments)
        moved = subject.run(subject.at(call, lambda x, o=order: x[o]), segments=segments[order])  # type: ignore[misc]
        if all(call.get(name) is None for name in RANDOM):
            for key, output in _per_token(moved, rows, length):
                yield difference("rows in another order", output, found.outputs[key][order])
        yield from _everything("rows in another order", moved)


def _like(mask: Tensor, x: Tensor) -> Tensor:
    return mask.reshape(*mask.shape, *[1] * (x.dim() - 2))


def _per_token(found: Run, rows: int, length: int) -> Iterator[tuple[str, Tensor]]:
    return ((key, output) for key, output in found.outputs.items() if tuple(output.shape[:2]) == (rows, length))


def _everything(what: str, found: Run) -> Iterator[Check]:
    """All outputs and gradients, for the comparison of a kernel with its reference."""
    yield Check(f"{what}: outputs", 0.0, 0.0, compared=tuple(found.outputs.values()))
    for name, gradient in found.gradients.items():
        yield Check(f"{what}: gradient of {name}", 0.0, 0.0, compared=(gradient,), gradient=True)


OP_LAWS: dict[str, Callable[[OpSubject], Iterator[Check]]] = {
    "packing": packing,
    "padding": padding,
    "batch order": batch_order,
}


def hold_reference(name: str, spec: OpSpec) -> Check:
    """Measure a law on an op's reference in fp64, and return the check nearest to its limit."""
    return _worst(_measure(name, spec, "reference", torch.float64))


def hold_kernel(name: str, spec: OpSpec, policy: Policy) -> Check:
    """Measure a law on an op in fp32 under a kernel policy, and return the check nearest to its limit."""
    return _worst(against_references(functools.partial(_measure, name, spec), policy))


def _measure(name: str, spec: OpSpec, policy: Policy, dtype: torch.dtype) -> list[Check]:
    subject = subject_of(spec, spec.reference if policy == "reference" else spec.op, dtype)
    with kernel_policy(policy):
        return list(OP_LAWS[name](subject))


def _worst(checks: Iterable[Check]) -> Check:
    return max(checks, key=lambda check: check.excess)
