"""The order of an epoch by arithmetic alone: any process, at any time, can say which rows window i holds."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ultrazoo.data.randomness import permutation
from ultrazoo.data.sources import Span

MIX = 16
"""Runs of rows from different places in one window, and row groups that streaming reads side by side."""
ORDER = 1
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class EpochPlan:
    """Chunks of rows in the order of one epoch, cut into windows at ``bounds``."""

    units: Ints
    starts: Ints
    stops: Ints
    bounds: Ints

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def spans(self, window: int) -> list[Span]:
        """Return the rows of a window."""
        part = slice(int(self.bounds[window]), int(self.bounds[window + 1]))
        columns = (self.units[part].tolist(), self.starts[part].tolist(), self.stops[part].tolist())
        return [Span(*item) for item in zip(*columns, strict=True)]


@dataclass(frozen=True)
class Plan:
    """Windows of ``window_rows`` rows for every epoch, a function of these fields and the epoch's number.

    Row groups are cut into chunks of a sixteenth of a window. Shuffled, a window takes chunks from anywhere; streaming,
    it takes them from sixteen row groups at a time, each read once and forwards, row groups in shuffled order.
    Unshuffled, chunks stay in file order.
    """

    unit_rows: Ints
    window_rows: int
    seed: int
    shuffle: bool
    streaming: bool

    def epoch(self, epoch: int) -> EpochPlan:
        """Return the windows of an epoch."""
        size = -(-self.window_rows // MIX)
        counts = -(-self.unit_rows // size)
        units = np.repeat(np.arange(len(counts)), counts)
        nth = np.arange(len(units)) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = nth * size
        stops = np.minimum(starts + size, self.unit_rows[units])
        if self.shuffle:
            order = self._lanes(epoch, counts, units, nth) if self.streaming else self._anywhere(epoch, len(units))
            units, starts, stops = units[order], starts[order], stops[order]
        before = np.cumsum(stops - starts) - (stops - starts)
        bounds = np.flatnonzero(np.diff(before // self.window_rows, prepend=-1))
        return EpochPlan(units, starts, stops, np.append(bounds, len(units)))

    def _anywhere(self, epoch: int, count: int) -> Ints:
        return permutation(count, ORDER, self.seed, epoch)

    def _lanes(self, epoch: int, counts: Ints, units: Ints, nth: Ints) -> Ints:
        """Deal row groups to MIX lanes, each to the shortest, and take a chunk from every lane in turn."""
        lane_of, offset_of = np.zeros_like(counts), np.zeros_like(counts)
        lanes = [(0, lane) for lane in range(MIX)]
        for unit in permutation(len(counts), ORDER, self.seed, epoch).tolist():
            length, lane = heapq.heappop(lanes)
            lane_of[unit], offset_of[unit] = lane, length
            heapq.heappush(lanes, (length + int(counts[unit]), lane))
        return np.lexsort((lane_of[units], offset_of[units] + nth))
