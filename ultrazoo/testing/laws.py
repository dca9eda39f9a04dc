"""The conformance kit for mixers: laws that hold for every block that mixes tokens, ours or a plugin's.

Each law takes a ``BlockSpec``, builds the block at a tiny size with scrambled weights (so that an initial zero hides
nothing), measures, and returns a ``LawResult`` or raises ``LawViolation`` with the numbers::

    from ultrazoo.testing.laws import LAWS, run_laws

    LAWS["padding"](spec)  # one law, raises
    for result in run_laws(spec):  # all of them
        print(result)

Structure is compared in fp64, so a limit is rounding error and not a tolerance. At padding there are large random
numbers. kernel_laws.py runs the same laws on compiled kernels in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from ultrazoo.spec import BlockKind, BlockSpec
from ultrazoo.testing.half import BF16_SCALES, FP16_SCALES, half_precision
from ultrazoo.testing.law_kit import (
    LAWS,
    RETURNING,
    ROUNDING,
    Check,
    LawResult,
    LawViolation,
    Subject,
    accepted,
    difference,
    law,
    packed_rows,
    with_gaps,
)
from ultrazoo.testing.slopes import slope

__all__ = ["LAWS", "LawResult", "LawViolation", "laws_of", "run_laws"]

MIXERS_ALONE = ("direction", "returning documents")
"""Laws that a block of another kind has no part in."""


def laws_of(kind: BlockKind) -> tuple[str, ...]:
    """Return the names of the laws that apply to a kind of block.

    Only a mixer has a direction, and reads which document a token is of. An embedding is checked in a model: it takes
    no vectors.
    """
    if kind == "embedding":
        return ()
    return tuple(name for name in LAWS if kind == "mixer" or name not in MIXERS_ALONE)


def run_laws(
    spec: BlockSpec, options: Mapping[str, Any] | None = None, laws: Iterable[str] | None = None
) -> Iterator[LawResult]:
    """Hold a block to the laws, one result after the other; broken laws are results too.

    Args:
        spec: The block.
        options: Fields of its config that differ from the tiny defaults.
        laws: Names from ``LAWS``; None: those of the block's kind.
    """
    for name in laws_of(spec.kind) if laws is None else laws:
        try:
            yield LAWS[name](spec, options)
        except LawViolation as violation:
            yield violation.result


@law("padding")
def padding(subject: Subject) -> Iterator[Check]:
    """Padding on the right or on the left changes nothing at real tokens, and outputs at padding are zero."""
    block, lengths = subject.build(), (41, 17, 1)
    x = subject.input(len(lengths), max(lengths))
    expected = [block(row[None, :n]) for row, n in zip(x, lengths, strict=True)]
    for before, after, name in ((0, 0, "right padding"), (0, 30, "30 more on the right"), (5, 3, "5 on the left")):
        total = before + max(lengths) + after
        wide, segments = 1e3 * subject.input(len(lengths), total, seed=2), torch.zeros(len(lengths), total).long()
        for row, n in enumerate(lengths):
            wide[row, before : before + n] = x[row, :n]
            segments[row, before : before + n] = 1
        y = block(wide, segments)
        for row, n in enumerate(lengths):
            real = y[row : row + 1, before : before + n]
            yield difference(f"document of {n} tokens, {name}: change at its tokens", real, expected[row])
        yield Check(f"{name}: largest output at padding", y[segments.eq(0)].abs().sum().item(), 0)


@law("packing")
def packing(subject: Subject) -> Iterator[Check]:
    """Documents packed in a row give what they give apart; ``segments=None`` is a full row of one document."""
    block, (segments, spans) = subject.build(), packed_rows()
    x = subject.input(*segments.shape)
    x = torch.where(segments.eq(0).unsqueeze(2), 1e3 * x, x)
    y = block(x, segments)
    for row, start, stop in spans:
        apart = block(x[row : row + 1, start:stop])
        what = f"document of {stop - start} tokens at {start} of row {row}: packed against apart"
        yield difference(what, y[row : row + 1, start:stop], apart)
    yield Check("largest output at padding", y[segments.eq(0)].abs().sum().item(), 0)
    full = block(x, torch.full_like(segments, 4))
    yield difference("segments=None against one segment for each row", block(x), full)


@law("batch order")
def batch_order(subject: Subject) -> Iterator[Check]:
    """A row's output depends neither on its place in the batch nor on the other rows."""
    block, (segments, _) = subject.build(), packed_rows()
    x, order = subject.input(*segments.shape), torch.tensor([2, 0, 1])
    y = block(x, segments)
    yield difference("rows in another order", block(x[order], segments[order]), y[order])
    yield difference("a row alone", block(x[1:2], segments[1:2]), y[1:2])


@law("direction")
def direction(subject: Subject) -> Iterator[Check]:
    """A bidirectional block's output depends on tokens on both sides, a causal one's never on later ones."""
    block, length = subject.build(), 21
    x = subject.input(1, length).expand(length, -1, -1).clone()
    moved = x + 0.5 * torch.eye(length, dtype=x.dtype).unsqueeze(2) * subject.input(1, 1, seed=3)
    y, moved_y = block(x), block(moved)
    change = (moved_y - y).abs().amax(2) / y.abs().max()  # (token moved, token read)
    earlier = change.triu(1).amax(0)[1:].min().item()
    later = change.tril(-1).amax(0)[:-1]
    compared = (y.detach(), moved_y.detach())
    yield Check("least influence of the tokens before on any token", earlier, 1e-7, at_least=True, compared=compared)
    if subject.spec.bidirectional:
        what = "least influence of the tokens after on any token"
        yield Check(what, later.min().item(), 1e-7, at_least=True, compared=compared)
    else:
        yield Check("largest influence of a later token", later.max().item(), ROUNDING, compared=compared)


@law("gradients")
def derivatives(subject: Subject) -> Iterator[Check]:
    """Derivatives along random directions, in fp64 at odd sizes, are those of central differences."""
    block = subject.build().train()
    segments = torch.tensor([[1, 1, 1, 1, 3, 3, 0], [2] * 7])
    x, probe = subject.input(2, 7).requires_grad_(), subject.input(2, 7, seed=4)
    inputs = {"x": x, **{name: p for name, p in block.named_parameters() if p.requires_grad}}
    noise = torch.Generator().manual_seed(5)

    def objective() -> Tensor:
        return (block(x, segments) * probe).sum()

    analytic = torch.autograd.grad(objective(), list(inputs.values()), allow_unused=True)
    rows = []
    for (name, value), gradient in zip(inputs.items(), analytic, strict=True):
        if gradient is None:
            yield Check(f"{name}: takes no part in the output, gradient", math.inf, 0)
        elif subject.dtype != torch.float64:  # differences are rounding errors there
            yield Check(f"gradient of {name}", 0.0, 0.0, compared=(gradient,), gradient=True)
        else:
            along = torch.randn(value.shape, generator=noise, dtype=torch.float64)
            rows.append((name, slope(objective, value, along), (gradient * along).sum().item(), gradient))
    floor = 1e-3 * max((abs(numeric) for _, numeric, _, _ in rows), default=0.0)
    for name, numeric, exact, gradient in rows:
        error = abs(numeric - exact) / max(abs(numeric), abs(exact), floor)
        what = f"{name}: derivative {exact:.6g}, by differences {numeric:.6g}, relative error"
        yield Check(what, error, 1e-5, compared=(gradient,), gradient=True)


@law("state")
def state(subject: Subject) -> Iterator[Check]:
    """A block that loads another's saved state gives its outputs, bit for bit."""
    block, other, (segments, _) = subject.build(), subject.build(seed=9), packed_rows()
    x = subject.input(*segments.shape)
    other.load_state_dict(load(save({name: value.contiguous() for name, value in block.state_dict().items()})))
    yield difference("output after loading", other(x, segments), block(x, segments), limit=0)


@law("compile")
def compiled(subject: Subject) -> Iterator[Check]:
    """``torch.compile(fullgraph=True)`` trains with segments, and infers without, as eager does."""
    block, (segments, _) = subject.build().train(), packed_rows()
    segments = segments[:2, 5:40]
    torch.compiler.reset()
    fast = torch.compile(block, fullgraph=True, backend="aot_eager")
    outcomes = []
    for module in (block, fast):
        x = subject.input(*segments.shape).requires_grad_()
        y = module(x, segments)
        outcomes.append((y, torch.autograd.grad(y.square().sum(), x)[0]))
    (y, dx), (fast_y, fast_dx) = outcomes
    yield difference("output with segments", fast_y, y)
    yield difference("gradient of the input with segments", fast_dx, dx, gradient=True)
    x = subject.input(*segments.shape)
    with torch.no_grad():
        yield difference("output without segments or gradients", fast(x), block(x))
    torch.compiler.reset()


@law("bf16")
def bf16(subject: Subject) -> Iterator[Check]:
    """Inputs of 1 to 1,000 give finite outputs and gradients in bf16, under autocast and in bf16 weights."""
    for scale in BF16_SCALES:
        yield from half_precision(subject, torch.bfloat16, scale)


@law("fp16")
def fp16(subject: Subject) -> Iterator[Check]:
    """Inputs of 1 to 30, as a norm gives them, give finite outputs and gradients in fp16, likewise."""
    for scale in FP16_SCALES:
        yield from half_precision(subject, torch.float16, scale)


@law("inputs")
def inputs_kept(subject: Subject) -> Iterator[Check]:
    """Neither x nor segments is written to, in the forward or the backward pass."""
    block, (segments, _) = subject.build().train(), packed_rows()
    leaf = subject.input(*segments.shape).requires_grad_()
    x, ids = leaf * 1, segments.clone()
    before = x.detach().clone()
    versions = x._version, ids._version
    block(x, ids).sum().backward()
    yield Check("largest change of x", (x.detach() - before).abs().max().item(), 0)
    yield Check("largest change of segments", (ids - segments).abs().max().item(), 0)
    writes = x._version - versions[0] + ids._version - versions[1]
    yield Check("in-place writes to x and segments", float(writes), 0)


@law("determinism")
def determinism(subject: Subject) -> Iterator[Check]:
    """Two runs are bit-equal, whatever ran between them: outputs and gradients, with dropout under one seed."""
    segments, _ = packed_rows()
    block = subject.build(torch.float32, dropout=0.3 if subject.has_dropout else None)
    x = subject.input(*segments.shape, dtype=torch.float32)
    before = block(x, segments)
    block(x[:1, :5])
    share = block(x, segments).ne(before).double().mean().item()
    yield Check("outputs in eval mode: share of numbers that differ", share, 0)
    block.train()
    runs = []
    for _ in range(2):
        block(x[:1, :5])
        torch.manual_seed(6)
        y = block(x, segments)
        values = {name: value for name, value in block.named_parameters() if value.requires_grad}
        gradients = torch.autograd.grad(y.sum(), list(values.values()), allow_unused=True)
        used = {name: value for name, value in zip(values, gradients, strict=True) if value is not None}
        runs.append({"outputs": y, **used})
    for key, value in runs[0].items():
        share = value.ne(runs[1][key]).double().mean().item()
        yield Check(f"{key} in train mode: share of numbers that differ", share, 0)


@law("gaps")
def gaps(subject: Subject) -> Iterator[Check]:
    """Padding inside documents changes nothing at real tokens: outputs and gradients are those with it cut out."""
    block, segments = subject.build(), with_gaps(packed_rows()[0])
    x, probe = subject.input(*segments.shape), subject.input(*segments.shape, seed=4)
    x = torch.where(segments.eq(0).unsqueeze(2), 1e3 * x, x).requires_grad_()
    y = block(x, segments)
    (dx,) = torch.autograd.grad((y * probe).sum(), x)
    for row, keep in enumerate(segments.ne(0)):
        cut = x[row : row + 1, keep].detach().requires_grad_()
        apart = block(cut, segments[row : row + 1, keep])
        (gradient,) = torch.autograd.grad((apart * probe[row, keep]).sum(), cut)
        what = f"row {row} with padding inside documents against the row without it"
        yield difference(f"{what}: output", y[row : row + 1, keep], apart)
        yield difference(f"{what}: gradient of x", dx[row : row + 1, keep], gradient)
    yield Check("largest output at padding", y[segments.eq(0)].abs().sum().item(), 0)


@law("returning documents")
def returning_documents(subject: Subject) -> Iterator[Check]:
    """A document number that returns after another document is an error."""
    block = subject.build()
    rows = accepted(lambda segments: block(subject.input(*segments.shape), segments))
    yield Check(f"rows accepted in which a document returns, of {len(RETURNING)}: {rows}", float(len(rows)), 0)
