"""Which rows are held out for validation: by position alone, the same for every seed, epoch and resume."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ultrazoo.data.randomness import draws, key
from ultrazoo.data.sources import ParquetSource, Span

HELD_OUT = 4
FEW_ROWS = 100


class Split:
    """Holds out ``fraction`` of the rows, and at least one.

    A row is held out when the hash of its file's number and its own number in the file is small.

    Args:
        source: The row groups.
        fraction: Share held out, in (0, 1).
    """

    def __init__(self, source: ParquetSource, fraction: float) -> None:
        self._states = [key(HELD_OUT, file) for file in range(len(source.files))]
        self._places = [(unit.file, unit.first_row) for unit in source.units]
        self._threshold = np.uint64(int(fraction * 2**53) << 11)
        if source.num_rows * fraction < FEW_ROWS:
            spans = [Span(unit, 0, rows) for unit, rows in enumerate(source.unit_rows.tolist())]
            smallest = min(self._hash(span).min() for span in spans)
            self._threshold = max(self._threshold, smallest)

    def held_out(self, span: Span) -> NDArray[np.bool_]:
        """Return, for each row of a span, whether it is held out."""
        return self._hash(span) <= self._threshold

    def _hash(self, span: Span) -> NDArray[np.uint64]:
        file, first = self._places[span.unit]
        return draws(self._states[file], np.arange(first + span.start, first + span.stop))
