"""The rule of ``segments``, checked and applied in one place for every reference and block.

``segments`` is (B, L): 0 is padding, and equal positive numbers are one document. A document is one run of tokens in
its row: a number that returns after another document is an error. Padding may be anywhere. Padding inside a document
is a gap, and its real tokens get what they get when the gap is cut out.

States, windows and convolutions are written for documents without gaps. ``Gaps`` moves the tokens so that this holds:
``close`` moves the gaps of each row to its end, ``open`` moves every token back. A row without gaps keeps its order.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

HINT = "number documents so that each is one run of tokens (zeros between them are padding)"


@dataclass(frozen=True)
class Gaps:
    """Segments without gaps, and how the tokens of a batch move between both orders."""

    segments: Tensor | None
    """(B, L) int64 without gaps, or None where every row is one full document."""
    _to_closed: Tensor | None = None
    """(B * L) int64, for each token without gaps its place with them; None where no token moves."""
    _to_open: Tensor | None = None
    """The inverse of ``_to_closed``."""

    @classmethod
    def of(cls, segments: Tensor | None) -> Gaps:
        """Check segments and find their gaps.

        On a CPU this costs one pass over the numbers where there are no gaps. On other devices, under
        ``torch.compile`` and the transforms of ``torch.func``, and for fake tensors, tokens always move, by indices
        that no host waits for.

        Args:
            segments: (B, L) int, or None.

        Raises:
            ValueError: A number is negative or returns after another document, or the shape is not (B, L). On a GPU
                wrong numbers are a device-side assertion.
            TypeError: The numbers are not integers.
        """
        if segments is None:
            return cls(None)
        if not torch.compiler.is_compiling():
            known, gaps = getattr(_shared, "known", (None, cls(None)))
            if segments is known:
                return gaps
        if segments.dim() != 2:
            raise ValueError(f"segments: got shape {tuple(segments.shape)}, expected (B, L); one number per token")
        if segments.is_floating_point() or segments.dtype == torch.bool:
            raise TypeError(f"segments: got {segments.dtype}, expected integers; 0 is padding")
        segments = segments.to(torch.int64)
        if segments.numel() == 0:
            return cls(segments)
        if _is_readable(segments) and not _has_gaps(segments):
            return cls(segments)
        to_closed, to_open = _moves(segments)
        return cls(_move(segments, to_closed), to_closed, to_open)

    @property
    def move(self) -> bool:
        """Whether ``close`` and ``open`` may move a token."""
        return self._to_closed is not None

    def close(self, x: Tensor) -> Tensor:
        """Move the gaps of each row of x (B, L, ...) to its end; x itself where no token moves."""
        return _moved(x, self._to_closed, self._to_open)

    def open(self, x: Tensor) -> Tensor:
        """Undo ``close``."""
        return _moved(x, self._to_open, self._to_closed)


def checked(segments: Tensor) -> Tensor:
    """Return segments (B, L) as int64, gaps included, after the checks of ``Gaps.of``."""
    gaps = Gaps.of(segments)
    assert gaps.segments is not None
    return gaps.open(gaps.segments)


def _is_readable(x: Tensor) -> bool:
    """Whether the host has the numbers of a tensor: not those of a graph, of a transform or of a fake tensor."""
    return x.is_cpu and not torch.compiler.is_compiling() and not _is_transformed() and type(x) is Tensor


def _is_transformed() -> bool:
    """Whether a transform of ``torch.func`` or ``torch.jit.trace`` runs."""
    return torch._C._are_functorch_transforms_active() or torch.jit.is_tracing()


def _moved(x: Tensor, index: Tensor | None, inverse: Tensor | None) -> Tensor:
    if index is None:
        return x
    if not torch.compiler.is_compiling() and _is_transformed():  # these do not take such an autograd function
        return _move(x, index)
    moved: Tensor = _Move.apply(x, index, inverse)
    return moved


_shared = threading.local()
"""``known``: the segments of ``shared`` and their ``Gaps``."""


@contextmanager
def shared(segments: Tensor) -> Iterator[Tensor]:
    """Check segments once for all that runs in the body: ``Gaps.of`` returns there what it found before.

    A layer that gradient checkpointing recomputes after the body gets its own ``Gaps``, which move the same tokens.

    Args:
        segments: (B, L) int, not written to in the body.

    Yields:
        The segments as int64, gaps included: this very tensor is known in the body, in this thread.
    """
    gaps, before = Gaps.of(segments), getattr(_shared, "known", (None, Gaps(None)))
    assert gaps.segments is not None
    given = gaps.open(gaps.segments)
    _shared.known = given, gaps
    try:
        yield given
    finally:
        _shared.known = before


class _Move(torch.autograd.Function):
    """A permutation of the tokens of a batch; its gradient moves back by the inverse, so no sum is taken."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(index, inverse)
        return _move(x, index)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        index, inverse = ctx.saved_tensors  # type: ignore[attr-defined]
        return _Move.apply(grad, inverse, index), None, None


def _move(x: Tensor, index: Tensor) -> Tensor:
    return x.flatten(0, 1).index_select(0, index).view(x.shape)


@torch.library.custom_op("ultrazoo_segments::moves", mutates_args=())
def _moves(segments: Tensor) -> tuple[Tensor, Tensor]:
    """Check segments (B, L), and return ``_to_closed`` and ``_to_open`` of their gaps.

    An operator of its own, so that the check is part of a compiled graph.
    """
    if segments.is_cpu:
        _has_gaps(segments)
    else:
        torch._assert_async(_is_valid(segments), f"segments: a number is negative or returns; {HINT}")
    rows, length = segments.shape
    order = is_gap(segments).to(torch.int8).argsort(dim=1, stable=True)
    offset = torch.arange(rows, device=segments.device).unsqueeze(1) * length
    return (order + offset).flatten(), (order.argsort(dim=1) + offset).flatten()


@_moves.register_fake
def _(segments: Tensor) -> tuple[Tensor, Tensor]:
    return segments.new_empty(segments.numel()), segments.new_empty(segments.numel())


def is_gap(segments: Tensor) -> Tensor:
    """Mark padding whose nearest real tokens on both sides are of one document: (B, L) bool."""
    before = last_documents(segments)
    return segments.eq(0) & before.ne(0) & before.eq(last_documents(segments, reverse=True))


def last_documents(segments: Tensor, reverse: bool = False) -> Tensor:
    """Return for each token the document of the nearest real token before it (``reverse``: after it), 0 for none.

    Args:
        segments: (B, L) int64.
        reverse: Look to the right.

    Returns:
        (B, L) int64.
    """
    if reverse:
        return last_documents(segments.flip(1)).flip(1)
    if segments.numel() == 0:
        return segments
    index = torch.arange(segments.shape[1], device=segments.device)
    at = torch.where(segments.ne(0), index, 0).cummax(1).values  # of the nearest real token, or 0
    return F.pad(segments.gather(1, at)[:, :-1], (1, 0))


def _is_valid(segments: Tensor) -> Tensor:
    """Tell whether no number is negative and every document is one run but for gaps: 0-dim bool, without a host."""
    new = segments.ne(0) & segments.ne(last_documents(segments))
    starts = torch.where(new, segments, 0).sort(1).values
    return ~(segments.lt(0).any() | (starts[:, 1:].eq(starts[:, :-1]) & starts[:, 1:].ne(0)).any())


def _has_gaps(segments: Tensor) -> bool:
    """Tell whether padding is inside a document.

    Args:
        segments: (B, L) int64 on the CPU, not empty.

    Raises:
        ValueError: A number is negative or returns after another document.
    """
    ids: NDArray[np.int64] = segments.detach().numpy()
    empty = ids == 0
    if ids.min() < 0 or not (empty | (ids == np.maximum.accumulate(ids, axis=1))).all():
        _check_rows(ids)  # numbers that do not only grow
    resumes = empty[:, :-1] & ~empty[:, 1:]
    if not resumes.any():
        return False
    last = np.maximum.accumulate(np.where(empty, 0, np.arange(ids.shape[1])), axis=1)
    filled = np.take_along_axis(ids, last, axis=1)
    return bool((resumes & (filled[:, :-1] == ids[:, 1:])).any())


def _check_rows(ids: NDArray[np.int64]) -> None:
    for row, numbers in enumerate(ids):
        places = np.flatnonzero(numbers)
        real = numbers[places]
        if real.size and real.min() < 0:
            place = places[real.argmin()]
            raise ValueError(
                f"segments[row {row}]: got {numbers[place]} at position {place}, expected 0 at padding and positive "
                "numbers of documents"
            )
        firsts = np.flatnonzero(np.diff(real, prepend=0))
        _, earliest = np.unique(real[firsts], return_index=True)
        again = np.setdiff1d(np.arange(firsts.size), earliest)
        if again.size:
            at = firsts[again[0]]
            raise ValueError(
                f"segments[row {row}]: document {real[at]} returns at position {places[at]} after document "
                f"{real[at - 1]}; {HINT}"
            )
