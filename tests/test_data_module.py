"""The data module: batches that keep every law, held-out rows that training never sees, figures by hand."""

from __future__ import annotations

import math
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_files import build, make_texts, originals, settings, write

from ultrazoo.data import Batch, DataModule, build_data
from ultrazoo.data.progress import Progress, duration
from ultrazoo.data.sources import Span
from ultrazoo.revisions import RULES, current_revisions

ROWS = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    texts = make_texts(ROWS)
    write(path / "data/a.parquet", texts[:170], group=40)
    write(path / "data/b.parquet", texts[170:], group=40)
    return path


def epoch_batches(data: DataModule, epoch: int = 0) -> list[Batch]:
    """The batches that begin in an epoch; only with batch size 1 are they exactly the epoch."""
    batches = []
    for batch in data.train_batches():
        if data.epoch > epoch + 1:
            return batches
        batches.append(batch)
    raise AssertionError("batches ended")


def numbers(data: DataModule, batches: list[Batch]) -> Counter[str]:
    """How often each row of the files begins in the batches; its first word is its number."""
    texts = [data.tokenizer.decode(piece).strip() for batch in batches for piece in originals(batch)]
    return Counter(text.split()[0] for text in texts if text and text[0] == "n" and text.split()[0][1:].isdigit())


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("streaming", [True, False])
def test_batches_have_shape_frame_and_targets(folder: Path, packed: bool, streaming: bool) -> None:
    data = build(folder, pack_sequences=packed, stream_local_parquet=streaming)
    real = most = 0
    for batch in islice(data.train_batches(), 20):
        for tensor in (batch.input_ids, batch.segments, batch.labels):
            assert tensor.shape == (7, 48) and tensor.dtype == torch.int64
        assert batch.num_tokens == int((batch.segments > 0).sum())
        assert ((batch.segments == 0) == (batch.input_ids == 0)).all()
        assert (batch.labels[batch.segments == 0] == -100).all()
        assert all(piece[0] == 2 and piece[-1] == 3 and min(piece[1:-1]) > 4 for piece in originals(batch))
        real += batch.num_tokens
        most = max(most, int(batch.segments.max()))
    assert (most > 1) is packed
    assert real / (20 * 7 * 48) > 0.9 or not packed
    moved = batch.to("cpu")
    assert torch.equal(moved.labels, batch.labels) and moved.num_tokens == batch.num_tokens


@pytest.mark.parametrize("streaming", [True, False])
def test_each_row_is_trained_on_once_per_epoch_and_held_out_rows_never(folder: Path, streaming: bool) -> None:
    data = build(folder, batch_size=1, stream_local_parquet=streaming, eval_max_batches=1000)
    trained = epoch_batches(data)
    held_out = numbers(data, data.validation_batches())
    seen = numbers(data, trained)
    assert set(seen.values()) == set(held_out.values()) == {1}
    assert len(held_out) > 5 and not set(seen) & set(held_out)
    assert set(seen) | set(held_out) == {f"n{i}" for i in range(ROWS)}
    # one window of about a fifth of the rows is a rough guide
    assert abs(data.rows_per_epoch - len(trained)) <= (0.15 * len(trained) if streaming else 0)


def test_validation_is_the_same_for_every_seed_and_way_of_reading(folder: Path) -> None:
    plain = build(folder).validation_batches()
    for changes in (
        {"seed": 5},
        {"stream_local_parquet": True, "prefer_local_cache": False},
        {"dataloader_workers": 1},
    ):
        other = build(folder, **changes).validation_batches()
        assert len(other) == len(plain) >= 1
        for a, b in zip(plain, other, strict=True):
            assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.labels, b.labels)
    assert len(build(folder, eval_max_batches=1, batch_size=2).validation_batches()) == 1


def test_streaming_gives_the_same_batches_from_text_and_from_a_cache(folder: Path) -> None:
    build(folder)
    modules = [build(folder, stream_local_parquet=True, prefer_local_cache=prefer) for prefer in (True, False)]
    assert modules[0].store is not modules[1].store and type(modules[0].store) is not type(modules[1].store)
    for a, b in islice(zip(*(module.train_batches() for module in modules), strict=True), 60):
        assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.labels, b.labels)


def test_epochs_differ_in_order_and_masks_and_not_in_content(folder: Path) -> None:
    data = build(folder, batch_size=1, pack_sequences=False)
    count = data.rows_per_epoch
    batches = list(islice(data.train_batches(), 2 * count))
    assert data.epoch == 2.0
    first, second = (
        Counter(tuple(p) for b in part for p in originals(b)) for part in (batches[:count], batches[count:])
    )
    assert first == second
    assert [b.input_ids.tolist() for b in batches[:count]] != [b.input_ids.tolist() for b in batches[count:]]
    by_text = {str(originals(b)): b.labels.tolist() for b in batches[:count]}
    changed = sum(by_text[str(originals(b))] != b.labels.tolist() for b in batches[count:])
    assert changed > 0.8 * count


def test_without_shuffle_rows_come_in_file_order(folder: Path) -> None:
    data = build(folder, shuffle=False, pack_sequences=False, batch_size=1)
    order = [int(number[1:]) for number in numbers(data, epoch_batches(data))]
    assert order == sorted(order) and len(order) > 270


def test_the_epoch_grows_evenly(folder: Path) -> None:
    data = build(folder)
    assert data.epoch == 0.0
    values = [data.epoch for _ in islice(data.train_batches(), 80)]
    steps = np.diff(values)
    assert (steps > 0).all() and steps.max() < 3 * steps.mean()
    assert abs(steps.mean() * data.rows_per_epoch / 7 - 1) < 0.1


def test_unigram_entropy_by_hand(tmp_path: Path) -> None:
    write(tmp_path / "data/a.parquet", ["el el el rey"] * 40)
    by_hand = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert build(tmp_path).unigram_entropy == pytest.approx(by_hand)
    assert build(tmp_path, stream_local_parquet=True, prefer_local_cache=False).unigram_entropy == pytest.approx(
        by_hand
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_the_unigram_statistics_exclude_held_out_rows(folder: Path, streaming: bool) -> None:
    options = {"stream_local_parquet": streaming, "prefer_local_cache": not streaming, "dataset_batch_size": 1024}
    data = build(folder, **options)
    units = [Span(unit, 0, rows) for unit, rows in enumerate(data.source.unit_rows.tolist())]
    ids = {held: data.store.read(units, held_out=held).documents.compact().ids for held in (False, True)}
    counts = {held: np.bincount(part, minlength=data.vocabulary.size) for held, part in ids.items()}
    assert len(ids[True]) > 100
    assert np.array_equal(data.unigram_counts, counts[False])
    old = build(folder, **options)
    old.revisions = {**current_revisions(), "unigram_counts": 1}
    assert np.array_equal(old.unigram_counts, counts[False] + counts[True])


def test_validation_masks_at_its_own_rate(folder: Path) -> None:
    def labels(**changes: Any) -> torch.Tensor:
        return torch.cat([batch.labels for batch in build(folder, **changes).validation_batches()])

    fixed = labels(mlm_probability=0.5)
    assert torch.equal(fixed, labels(mlm_probability=0.15)) and torch.equal(fixed, labels())
    data = build(folder)
    tokens = sum(batch.num_tokens - 2 * len(originals(batch)) for batch in data.validation_batches())
    assert abs(int((fixed != -100).sum()) / tokens - 0.15) < 0.03
    assert int((labels(eval_mlm_probability=0.5) != -100).sum()) > 2 * int((fixed != -100).sum())
    old = build_data(settings(folder, mlm_probability=0.5), 8192, print, revisions=dict.fromkeys(RULES, 1))
    following = torch.cat([batch.labels for batch in old.validation_batches()])
    assert torch.equal(following, labels(eval_mlm_probability=0.5))


def test_whole_words_and_mask_probability_act(folder: Path) -> None:
    shares = {}
    for probability in (0.15, 0.5):
        batches = list(islice(build(folder, mlm_probability=probability).train_batches(), 40))
        targets = sum(int((b.labels != -100).sum()) for b in batches)
        shares[probability] = targets / sum(b.num_tokens - 2 * len(originals(b)) for b in batches)
    assert abs(shares[0.15] - 0.15) < 0.02 and abs(shares[0.5] - 0.5) < 0.02
    plain, words = (next(build(folder, whole_word_masking=on).train_batches()) for on in (False, True))
    assert originals(plain) == originals(words) and not torch.equal(plain.labels, words.labels)


def test_skipped_rows_are_reported_while_streaming(tmp_path: Path) -> None:
    write(tmp_path / "data/a.parquet", [*make_texts(100), None, "", None], group=25)
    lines: list[str] = []
    data = build(tmp_path, lines, stream_local_parquet=True, validation_fraction=0.01)
    for _ in data.train_batches():
        if data.epoch > 1.2:
            break
    assert sum(data.stats["skipped"].values()) >= 2 and set(data.stats["skipped"]) <= {"null", "empty"}
    assert [line for line in lines if line.startswith("data: skipped in the first epoch: ")]
    assert data.stats["tokens"] > 1000 and data.stats["bytes"] > 4000


def test_progress_tells_rate_and_time_left() -> None:
    lines, now = [], [0.0]
    progress = Progress("tokenising", 1000, lines.append, clock=lambda: now[0])
    for second in range(1, 11):
        now[0] = float(second)
        progress.add(100, 5_000_000)
    assert lines == [
        "tokenising: 20%, 100 rows/s, 5.0 MB/s, 8 s left",
        "tokenising: 70%, 100 rows/s, 5.0 MB/s, 3 s left",
    ]
    assert [duration(s) for s in (0.4, 59.4, 185, 7800)] == ["0 s", "59 s", "3 min 05 s", "2 h 10 min"]
