"""Holds the rows of one run to those of another."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from ultrazoo.bench.records import Row

BUSY = 0.1
"""A ceiling that differs by more than this share means that the machine itself ran at another speed."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One task and backend in both runs."""

    name: str
    sample: str
    backend: str
    direction: str
    dtype: str
    device: str
    threads: int
    before_s: float
    after_s: float
    ratio: float
    """Time after over time before: below 1 is faster."""
    ceiling_ratio: float
    """The same of the matrix product that was measured beside them."""
    verdict: str
    """``faster`` or ``slower`` where the quartiles do not overlap, else ``within the spread``; or ``too noisy``."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def compare(before: Iterable[Row], after: Iterable[Row]) -> list[Change]:
    """Match the rows of two runs and return a verdict on each; of rows for the same thing the last one counts."""
    old, new = _by_key(before), _by_key(after)
    return [_change(old[key], new[key]) for key in new if key in old]


def unmatched(before: Iterable[Row], after: Iterable[Row]) -> tuple[int, int]:
    """Return how many rows are in the first run alone and in the second alone."""
    old, new = set(_by_key(before)), set(_by_key(after))
    return len(old - new), len(new - old)


def notes(changes: Iterable[Change], before: Iterable[Row], after: Iterable[Row]) -> list[str]:
    """Return what makes a comparison unfair: other machines, other versions, a machine that was busier."""
    old, new = next(iter(before)).machine, next(iter(after)).machine
    differing = [name for name in ("name", "cpu_kernels", "torch") if getattr(old, name) != getattr(new, name)]
    found = [f"{name} differs: {getattr(old, name)!r} before, {getattr(new, name)!r} after" for name in differing]
    busy = [change for change in changes if abs(change.ceiling_ratio - 1) > BUSY]
    if busy:
        worst = max(busy, key=lambda change: abs(change.ceiling_ratio - 1))
        found.append(
            f"the matrix product beside {len(busy)} of the rows took {worst.ceiling_ratio:.2f} times as long after as "
            "before, at worst: the machine was not equally free; run both again"
        )
    return found


def _by_key(rows: Iterable[Row]) -> dict[tuple[Any, ...], Row]:
    fields = ("kind", "name", "sample", "backend", "direction", "dtype", "device", "threads", "clock")
    return {tuple(getattr(row, field) for field in fields): row for row in rows}


def _change(old: Row, new: Row) -> Change:
    verdict = "faster" if new.q3_s < old.q1_s else "slower" if new.q1_s > old.q3_s else "within the spread"
    return Change(
        name=new.name,
        sample=new.sample,
        backend=new.backend,
        direction=new.direction,
        dtype=new.dtype,
        device=new.device,
        threads=new.threads,
        before_s=old.median_s,
        after_s=new.median_s,
        ratio=new.median_s / old.median_s,
        ceiling_ratio=old.gemm_gflops / new.gemm_gflops,
        verdict="too noisy" if old.is_noisy or new.is_noisy else verdict,
    )
