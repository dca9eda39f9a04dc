"""The order of rows: each once per epoch, the same on every machine, streamed with few row groups open."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from data_files import make_texts, write

from ultrazoo.data.plan import MIX, Plan
from ultrazoo.data.randomness import draws, key, permutation
from ultrazoo.data.sources import Span, open_source
from ultrazoo.data.split import Split

GROUPS = np.array([100, 3, 64, 1, 250, 512, 17, 99, 5, 5, 5, 300, 41, 77, 2, 8, 123, 64, 90, 33])


def rows(spans: list[Span]) -> list[tuple[int, int]]:
    return [(span.unit, row) for span in spans for row in range(span.start, span.stop)]


def order(plan: Plan, epoch: int) -> list[tuple[int, int]]:
    windows = plan.epoch(epoch)
    return [row for window in range(len(windows)) for row in rows(windows.spans(window))]


def test_random_numbers_are_those_of_splitmix64() -> None:
    # the published sequence for the seed 1234567
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert draws(1234567, np.arange(5)).tolist() == expected
    assert permutation(8, 1, 2).tolist() == permutation(8, 1, 2).tolist() != permutation(8, 2, 1).tolist()
    values = draws(key(9), np.arange(100_000)) * 2.0**-64
    assert abs(values.mean() - 0.5) < 0.005 and abs(values.var() - 1 / 12) < 0.002


@pytest.mark.parametrize("window_rows", [1, 5, 64, 1000, 5000])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_each_row_comes_once_per_epoch(window_rows: int, streaming: bool, shuffle: bool) -> None:
    plan = Plan(GROUPS, window_rows, 3, shuffle, streaming)
    everything = [(unit, row) for unit, count in enumerate(GROUPS) for row in range(count)]
    for epoch in range(3):
        assert sorted(order(plan, epoch)) == everything
    windows = plan.epoch(0)
    sizes = [len(rows(windows.spans(window))) for window in range(len(windows))]
    chunk = -(-window_rows // MIX)
    assert max(sizes) < window_rows + chunk and min(sizes[:-1], default=window_rows) > window_rows - chunk
    assert (order(plan, 0) == everything) is (not shuffle)


def test_epochs_and_seeds_differ_and_repeat() -> None:
    for streaming in (False, True):
        orders = [order(Plan(GROUPS, 64, seed, True, streaming), epoch) for seed in (0, 1) for epoch in (0, 1)]
        assert len({tuple(item) for item in orders}) == 4
        assert order(Plan(GROUPS, 64, 0, True, streaming), 1) == orders[1]


def test_a_window_mixes_distant_rows() -> None:
    windows = Plan(np.full(40, 500), 512, 0, True, streaming=False).epoch(0)
    for plan in (windows, Plan(np.full(40, 500), 512, 0, True, streaming=True).epoch(0)):
        units = [len({unit for unit, _ in rows(plan.spans(window))}) for window in range(len(plan) // 2)]
        assert min(units) >= 10


def test_streaming_reads_few_row_groups_at_a_time_and_each_forwards() -> None:
    counts = np.tile(GROUPS, 5)
    windows = Plan(counts, 160, 0, True, streaming=True).epoch(2)
    left, read, most = Counter(dict(enumerate(counts.tolist()))), Counter[int](), 0
    for window in range(len(windows)):
        for span in windows.spans(window):
            assert span.start == read[span.unit]
            read[span.unit] = span.stop
            left[span.unit] -= span.stop - span.start
        most = max(most, sum(read[unit] > 0 and left[unit] > 0 for unit in read))
    assert not any(left.values()) and most <= MIX


def test_held_out_rows_depend_on_position_alone(tmp_path: Path) -> None:
    texts = make_texts(4000, longest=3)
    write(tmp_path / "1/a.parquet", texts, group=1000)
    write(tmp_path / "2/a.parquet", texts, group=170)
    masks = []
    for folder in ("1", "2"):
        source = open_source(str(tmp_path / folder))
        split = Split(source, 0.1)
        spans = [Span(unit, 0, count) for unit, count in enumerate(source.unit_rows.tolist())]
        masks.append(np.concatenate([split.held_out(span) for span in spans]))
        assert np.array_equal(split.held_out(Span(1, 20, 60)), split.held_out(spans[1])[20:60])
    assert np.array_equal(masks[0], masks[1])
    assert 0.08 < masks[0].mean() < 0.12


@pytest.mark.parametrize("count", [2, 5, 40])
def test_a_small_source_holds_out_at_least_one_row(tmp_path: Path, count: int) -> None:
    source = open_source(str(write(tmp_path / "a.parquet", make_texts(count), group=3)))
    held_out = sum(Split(source, 0.001).held_out(Span(unit, 0, n)).sum() for unit, n in enumerate(source.unit_rows))
    assert held_out == 1
