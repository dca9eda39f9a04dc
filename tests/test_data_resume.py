"""Stopping anywhere and going on elsewhere gives the very batches of a run that was never stopped."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from data_files import as_json, build, make_texts, write

from ultrazoo.data import Batch
from ultrazoo.errors import DataError

TOTAL = 150


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resume")
    texts: list[str | None] = [*make_texts(240)]
    texts[10:12] = [None, ""]
    write(path / "data/a.parquet", texts[:100], group=17)
    write(path / "data/b.parquet", texts[100:], group=60)
    return path


def same(first: Batch, second: Batch) -> bool:
    pairs = [(getattr(first, name), getattr(second, name)) for name in ("input_ids", "segments", "labels")]
    return all(torch.equal(a, b) for a, b in pairs) and first.num_tokens == second.num_tokens


def stopped_and_resumed(folder: Path, stops: list[int], changes: dict[str, Any]) -> Iterator[tuple[Batch, float]]:
    """Batches of a run that is stopped at each of ``stops`` and goes on in a fresh module."""
    state, done = None, 0
    for stop in [*stops, TOTAL]:
        data = build(folder, **changes)
        if state is not None:
            data.load_state_dict(state)
        for batch in islice(data.train_batches(), stop - done):
            yield batch, data.epoch
        state, done = as_json(data.state_dict()), stop


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_resumed_run_repeats_and_loses_nothing(folder: Path, streaming: bool, packed: bool, workers: int) -> None:
    changes = {
        "stream_local_parquet": streaming,
        "prefer_local_cache": not streaming,
        "pack_sequences": packed,
        "whole_word_masking": packed,
        "dataloader_workers": workers,
    }
    data = build(folder, **{**changes, "dataloader_workers": 0})
    expected = [(batch, data.epoch) for batch in islice(data.train_batches(), TOTAL)]
    assert data.epoch > 1.5, "the stops must reach over the end of an epoch"
    border = next(i for i, (_, epoch) in enumerate(expected) if epoch > 1)
    chance = random.Random(f"{changes}")
    stops = sorted({border - 1, border, *chance.sample(range(TOTAL), 2), *([] if workers else [0, 1, border + 1])})
    found = list(stopped_and_resumed(folder, stops, changes))
    assert len(found) == TOTAL
    for (a, first_epoch), (b, second_epoch) in zip(expected, found, strict=True):
        assert same(a, b) and first_epoch == second_epoch


@pytest.mark.parametrize("streaming", [False, True])
def test_the_order_is_the_same_for_any_number_of_workers_and_threads(folder: Path, streaming: bool) -> None:
    runs = [
        list(
            islice(
                build(folder, stream_local_parquet=streaming, prefer_local_cache=not streaming, **c).train_batches(),
                120,
            )
        )
        for c in (
            {"dataloader_workers": 0},
            {"dataloader_workers": 1},
            {"dataloader_workers": 2, "num_workers": 5},
        )
    ]
    for others in runs[1:]:
        assert all(same(a, b) for a, b in zip(runs[0], others, strict=True))


def test_rows_do_not_depend_on_the_batch_size(folder: Path) -> None:
    rows = {}
    for size in (3, 7, 64):
        batches = islice(build(folder, batch_size=size).train_batches(), 448 // size)
        rows[size] = torch.cat([torch.stack([b.input_ids, b.labels]) for b in batches], dim=1)[:, :441]
    assert torch.equal(rows[3], rows[7]) and torch.equal(rows[7], rows[64][:, :441])


def test_an_iterator_that_is_dropped_leaves_the_position_after_its_last_batch(folder: Path) -> None:
    expected = list(islice(build(folder).train_batches(), 9))
    data = build(folder, dataloader_workers=1)
    assert data.state_dict()["epoch"] == data.state_dict()["row"] == 0
    first = list(islice(data.train_batches(), 4))
    then = list(islice(data.train_batches(), 5))
    assert all(same(a, b) for a, b in zip(expected, first + then, strict=True))


def test_counts_of_skipped_rows_survive_a_resume(folder: Path) -> None:
    changes = {"stream_local_parquet": True, "prefer_local_cache": False}
    whole = build(folder, **changes)
    list(islice(whole.train_batches(), TOTAL))
    data = build(folder, **changes)
    for _ in range(6):
        list(islice(data.train_batches(), TOTAL // 6))
        state = as_json(data.state_dict())
        data = build(folder, **changes)
        data.load_state_dict(state)
    assert data.stats == whole.stats and whole.stats["skipped"] == {"empty": 1, "null": 1}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, r"training\.seed: saved 0, now 1"),
        ({"max_length": 64}, r"training\.max_length: saved 48, now 64"),
        ({"stream_local_parquet": True}, r"training\.stream_local_parquet: saved False, now True"),
        ({"max_samples": 200}, r"data: saved \w{12}, now \w{12}"),
        ({"tokenizer": None}, r"tokenizer: saved \w{12}, now \w{12}"),
    ],
)
def test_a_position_in_something_else_is_refused(folder: Path, changes: dict[str, Any], named: str) -> None:
    state = build(folder).state_dict()
    other = build(folder, **changes)
    with pytest.raises(DataError, match=rf"cannot go on at the saved position.*{named}.*start a new run"):
        other.load_state_dict(state)
    with pytest.raises(DataError, match="got format None, expected 1"):
        other.load_state_dict({})


def test_settings_without_part_in_the_order_may_change(folder: Path) -> None:
    data = build(folder)
    list(islice(data.train_batches(), 3))
    other = build(
        folder, batch_size=3, dataloader_workers=1, num_workers=1, mlm_probability=0.3, prefer_local_cache=False
    )
    other.load_state_dict(data.state_dict())
    a, b = next(data.train_batches()), next(other.train_batches())
    assert torch.equal(a.segments[:3], b.segments)
