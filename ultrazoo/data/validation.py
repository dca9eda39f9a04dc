"""The held-out rows that validation uses."""

from __future__ import annotations

from ultrazoo.data.packing import Documents, cut
from ultrazoo.data.randomness import permutation
from ultrazoo.data.sources import ParquetSource, Span
from ultrazoo.data.stores import Store

VALIDATION = 6


def held_out_documents(
    source: ParquetSource, store: Store, *, rows_at_once: int, max_length: int, wanted: int
) -> Documents:
    """Return held-out documents from row groups in an order that is always the same.

    Args:
        source: Row groups.
        store: Where documents come from.
        rows_at_once: Rows that are read in one go.
        max_length: Tokens of a row, special ones included.
        wanted: Tokens, special ones included, at which to stop; there may be fewer.
    """
    parts: list[Documents] = []
    for unit in permutation(len(source.units), VALIDATION).tolist():
        rows = source.units[unit].rows
        for start in range(0, rows, rows_at_once):
            span = Span(unit, start, min(start + rows_at_once, rows))
            parts.append(store.read([span], held_out=True).documents.compact())
            wanted -= int((cut(parts[-1], max_length)[1] + 2).sum())
            if wanted <= 0:
                return Documents.join(parts)
    return Documents.join(parts)
