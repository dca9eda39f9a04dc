"""SplitMix64 streams: every random choice of the data is a function of whole numbers, the same with any numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
U64 = NDArray[np.uint64]


def mix(x: U64) -> U64:
    """Return SplitMix64's output for each state in ``x``, a bijection of 64-bit numbers."""
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def key(*parts: int) -> int:
    """Return the 64-bit state named by a tuple of whole numbers."""
    state = len(parts)
    for part in parts:
        mixed = mix(np.array([(state ^ (part & MASK)) + GOLDEN & MASK], dtype=np.uint64))
        state = int(mixed[0])
    return state


def draws(state: int | U64, positions: NDArray[Any]) -> U64:
    """Return the draws of the stream(s) ``state`` at ``positions``; the two shapes broadcast."""
    base = np.uint64(state) if isinstance(state, int) else state
    return mix(base + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN))


def permutation(count: int, *parts: int) -> NDArray[np.int64]:
    """Return the permutation of ``range(count)`` named by a tuple of whole numbers."""
    return np.argsort(draws(key(*parts), np.arange(count)), kind="stable")
