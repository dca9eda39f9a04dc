"""The machinery of the laws: what is under test, how a measurement is judged, how a law is registered."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ultrazoo.callables import construct, in_one_line, place_in, place_of
from ultrazoo.config import ModelConfig
from ultrazoo.errors import ConfigError
from ultrazoo.nn.segments import mask_padding
from ultrazoo.spec import BlockKind, BlockSpec

TINY: Mapping[str, Any] = {"num_heads": 2, "retention_heads": 2, "dropout": 0.0, "ffn_hidden_size": 12}
WIDTHS = (8, 16, 32, 64, 128, 256)
"""A block is held to the laws at the first of these widths that it accepts."""
ROUNDING = 1e-10
"""Largest difference, relative to the largest output, that reordering fp64 sums may cause."""
DOCUMENTS = ((9, 33, 1, 20), (40, 5, 2), (3, 0, 34, 1, 1))
"""Lengths of the documents of three packed rows; shorter and longer than any chunk. A 0 is a padding token between."""


@dataclass(frozen=True, kw_only=True)
class LawResult:
    """The measurement of a law that came nearest to its limit, or went farthest past it."""

    number: int
    law: str
    block: str
    passed: bool
    what: str
    measured: float
    limit: float
    seconds: float
    at_least: bool = False
    """The limit is the least and not the most that is allowed."""
    place: str = ""
    """``file:line`` of the block's code: where it raised an error, or else its ``forward``."""

    def __str__(self) -> str:
        verdict = "holds" if self.passed else "BROKEN"
        return (
            f"{self.block}: law {self.number} ({self.law}) {verdict}: {self.what}: {self.measured:.3g}, "
            f"limit {self.limit:.3g} [{self.seconds:.2f} s]{'' if self.passed or not self.place else f' {self.place}'}"
        )


class LawViolation(AssertionError):  # noqa: N818 - it is one, and reads as one in a traceback
    """A block broke a law; ``result`` has the numbers."""

    def __init__(self, result: LawResult) -> None:
        super().__init__(str(result))
        self.result = result


@dataclass(frozen=True)
class Check:
    """A number that a law measured, and the most (or, with ``at_least``, the least) that it may be."""

    what: str
    measured: float
    limit: float
    at_least: bool = False
    compared: tuple[Tensor, ...] = field(default=(), repr=False)
    """What was computed for it, which a kernel must give too (kernel_laws.py)."""
    gradient: bool = False
    """``compared`` are gradients."""

    @property
    def excess(self) -> float:
        """Above 1 where the check fails; NaN fails."""
        if not math.isfinite(self.measured):
            return math.inf
        if self.at_least:
            return self.limit / self.measured if self.measured > 0 else math.inf
        return self.measured / self.limit if self.limit else (math.inf if self.measured else 0.0)


@dataclass(frozen=True)
class Subject:
    """A block under test, with the options that differ from the tiny defaults, and the dtype of its numbers."""

    spec: BlockSpec
    options: Mapping[str, Any]
    dtype: torch.dtype = torch.float64

    @cached_property
    def values(self) -> dict[str, Any]:
        """Fields of the block's config: tiny ones, at the smallest width that it accepts, and the options given.

        Raises:
            ValueError: It accepts none of them.
        """
        fields = self.spec.config.model_fields
        shared = {
            name: ModelConfig.model_fields[name].get_default(call_default_factory=True)
            for name, field in fields.items()
            if field.is_required() and name in ModelConfig.model_fields
        }
        values = {**shared, **{name: value for name, value in TINY.items() if name in fields}, **self.options}
        if "hidden_size" not in fields or "hidden_size" in self.options:
            return values
        for width in WIDTHS:
            values["hidden_size"] = width
            try:
                construct(self.spec, self.spec.config(**values))
            except (ConfigError, ValueError, RuntimeError) as error:  # pydantic's is a ValueError
                refusal = error
            else:
                return values
        raise ValueError(f"accepts none of the widths {', '.join(map(str, WIDTHS))}: {refusal}") from refusal

    def build(self, dtype: torch.dtype | None = None, *, seed: int = 0, dropout: float | None = None) -> nn.Module:
        """Build the block in eval mode with every parameter moved off its initial value.

        Returns:
            A module that maps x (B, L, D) and segments to y (B, L, D), of whatever kind the block is.
        """
        values = self.values if dropout is None else {**self.values, "dropout": dropout}
        torch.manual_seed(seed)
        block = _ADAPTERS.get(self.spec.kind, _as_it_is)(construct(self.spec, self.spec.config(**values)))
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape))
        return block.to(dtype or self.dtype).eval()

    def input(self, rows: int, length: int, *, dtype: torch.dtype | None = None, seed: int = 1) -> Tensor:
        """Draw (rows, length, D) from N(0, 1)."""
        width = self.values.get("hidden_size", WIDTHS[0])
        return torch.randn(rows, length, width, generator=torch.Generator().manual_seed(seed)).to(dtype or self.dtype)

    @property
    def has_dropout(self) -> bool:
        """Whether the block has a dropout of its own."""
        return "dropout" in self.spec.config.model_fields


class _FeedForward(nn.Module):
    """A feed-forward without its auxiliary values, which may give anything at padding."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.ffn = block

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        return mask_padding(self.ffn(x, segments)[0], segments)


class _Norm(nn.Module):
    """A norm, which knows no segments."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.norm = block

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        return mask_padding(self.norm(x), segments)


def _as_it_is(block: nn.Module) -> nn.Module:
    return block


_ADAPTERS: dict[BlockKind, Callable[[nn.Module], nn.Module]] = {"ffn": _FeedForward, "norm": _Norm}

Law = Callable[..., LawResult]
Measure = Callable[[Subject], Iterable[Check]]
LAWS: dict[str, Law] = {}
"""Law by name, in the order of their numbers: ``law(spec, options=None) -> LawResult``, raising ``LawViolation``."""
MEASURES: dict[str, Measure] = {}
"""The same laws as functions that yield what they measure of a subject."""


def law(name: str) -> Callable[[Measure], Law]:
    """Enter a law in ``LAWS`` under the next number.

    Args:
        name: Its key.

    Returns:
        A decorator of a function that yields its measurements of a subject. The law that it makes raises
        ``LawViolation`` when one of them is past its limit, or when the block raises an error.
    """

    def register(measure: Measure) -> Law:
        def hold(spec: BlockSpec, options: Mapping[str, Any] | None = None) -> LawResult:
            return judge(name, spec, lambda: measure(Subject(spec, options or {})))

        hold.__name__, hold.__doc__ = measure.__name__, measure.__doc__
        LAWS[name], MEASURES[name] = hold, measure
        return hold

    return register


def judge(name: str, spec: BlockSpec, measure: Callable[[], Iterable[Check]]) -> LawResult:
    """Return the check of a law that is nearest to its limit.

    Args:
        name: The law.
        spec: The block.
        measure: Yields the checks; its random numbers leave the caller's as they are.

    Raises:
        LawViolation: A check is past its limit, or an error was raised.
    """
    begun = time.perf_counter()

    def result(check: Check, place: str) -> LawResult:
        return LawResult(
            number=list(LAWS).index(name) + 1,
            law=name,
            block=spec.name,
            passed=check.excess <= 1,
            what=check.what,
            measured=check.measured,
            limit=check.limit,
            seconds=time.perf_counter() - begun,
            at_least=check.at_least,
            place=place,
        )

    try:
        with torch.random.fork_rng(devices=[]):
            worst = max(measure(), key=lambda check: check.excess)
    except Exception as error:
        check = Check(in_one_line(error), math.inf, 0)
        raise LawViolation(result(check, place_in(error, spec.module))) from error
    found = result(worst, place_of(spec.module))
    if worst.excess > 1:
        raise LawViolation(found)
    return found


def difference(what: str, got: Tensor, expected: Tensor, limit: float = ROUNDING, *, gradient: bool = False) -> Check:
    """Measure the largest difference of two tensors, relative to the largest number expected.

    Raises:
        ValueError: Their shapes differ.
    """
    if got.shape != expected.shape:
        raise ValueError(f"{what}: got shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
    same = torch.equal(got, expected)
    measured = 0.0 if same else ((got - expected).abs().max() / expected.abs().max()).item()
    return Check(what, measured, limit, compared=(got.detach(), expected.detach()), gradient=gradient)


def finite(what: str, x: Tensor) -> Check:
    """Measure the share of infinities and NaNs; none is allowed."""
    return Check(f"{what}: share of numbers that are not finite", 1 - x.isfinite().double().mean().item(), 0)


RETURNING: tuple[tuple[int, ...], ...] = ((1, 2, 1, 2), (4, 4, 0, 2, 4), (3, 1, 0, 2, 0, 0, 1))
"""Rows in which a document returns after another one."""


def accepted(run: Callable[[Tensor], object]) -> list[tuple[int, ...]]:
    """Return the rows of ``RETURNING`` for which ``run(segments)`` raises no ValueError or RuntimeError."""
    found = []
    for row in RETURNING:
        with contextlib.suppress(ValueError, RuntimeError):
            run(torch.tensor([row]))
            found.append(row)
    return found


def with_gaps(segments: Tensor) -> Tensor:
    """Put padding inside the documents of segments (B, L): every fifth token, and six in a row."""
    index = torch.arange(segments.shape[1], device=segments.device)
    return segments.masked_fill(index.remainder(5).eq(3) | (index.ge(28) & index.lt(34)), 0)


def packed_rows() -> tuple[Tensor, list[tuple[int, int, int]]]:
    """Lay out ``DOCUMENTS``, with 3 tokens of padding after the longest row.

    Returns:
        Segments (3, L) int64, and (row, start, stop) of each document.
    """
    length = 3 + max(sum(max(n, 1) for n in row) for row in DOCUMENTS)
    segments, spans = torch.zeros(len(DOCUMENTS), length, dtype=torch.int64), []
    for row, lengths in enumerate(DOCUMENTS):
        start = 0
        for number, n in enumerate(lengths):
            if n:
                segments[row, start : start + n] = 7 - number
                spans.append((row, start, start + n))
            start += max(n, 1)
    return segments, spans
