"""``on_bad_data``: what cannot be used is left out, counted and told, or ends the run; a resume changes nothing."""

from __future__ import annotations

import errno
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_files import as_json, build, flip, make_texts, originals, write

from ultrazoo.data.reading import RowReader
from ultrazoo.data.sources import Span, damage_told, open_source
from ultrazoo.errors import DataError

STREAMED = {"stream_local_parquet": True, "prefer_local_cache": False}
PLAIN = {"compression": "none", "use_dictionary": False}
WAYS = pytest.mark.parametrize("way", [STREAMED, {}], ids=["streaming", "cached"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files of 100 rows in groups of 20, the second cut short, a row group of the third with a flipped bit."""
    texts = make_texts(300, longest=30)
    for number, name in enumerate("abc"):
        write(tmp_path / f"data/{name}.parquet", texts[100 * number : 100 * number + 100], group=20, **PLAIN)
    cut = tmp_path / "data/b.parquet"
    cut.write_bytes(cut.read_bytes()[:-100])
    flip(tmp_path / "data/c.parquet", group=2)
    return tmp_path


def names(batches: list[Any]) -> list[tuple[int, ...]]:
    return sorted(tuple(piece) for batch in batches for piece in originals(batch))


def one_epoch(data: Any) -> list[Any]:
    """The batches of a little less than an epoch."""
    batches = []
    for batch in data.train_batches():
        batches.append(batch)
        if data.epoch >= 1:
            return batches
    raise AssertionError("batches never end")


@WAYS
def test_a_damaged_file_and_row_group_are_left_out_named_and_counted(folder: Path, way: dict[str, Any]) -> None:
    lines: list[str] = []
    data = build(folder, lines, **way)
    one_epoch(data)
    next(data.train_batches())
    stats = data.stats
    assert list(stats["damaged_files"]) == ["b.parquet"]
    assert [place.rpartition("/")[2] for place in stats["damage"]] == ["c.parquet: row group 2"]
    lost = stats["skipped"]["in a damaged row group"]
    assert len(stats["skipped"]) == 1
    assert lost == 20 if not way else 17 <= lost <= 20, "streaming counts the rows that are not held out"
    text = "\n".join(lines)
    assert text.count("b.parquet: not a readable Parquet file") == 1
    assert text.count("c.parquet: row group 2 is damaged near its row 0") == 1
    assert data.left_out == f"{lost} rows and 1 file ({lost} in a damaged row group)"
    state = as_json(data.state_dict())
    assert list(state["damaged_files"]) == ["b.parquet"]


@WAYS
@pytest.mark.parametrize("workers", [0, 2])
def test_the_rest_is_what_a_source_without_them_gives_and_a_resume_repeats_it(
    folder: Path, way: dict[str, Any], workers: int
) -> None:
    changes = {"dataloader_workers": workers, **way}
    expected = list(islice(build(folder, **way).train_batches(), 40))
    state, found = None, []
    for stop in (3, 4, 17, 16):
        data = build(folder, **changes)
        if state is not None:
            data.load_state_dict(state)
        found += list(islice(data.train_batches(), stop))
        state = as_json(data.state_dict())
    assert len(found) == 40
    for first, second in zip(expected, found, strict=True):
        assert torch.equal(first.input_ids, second.input_ids) and torch.equal(first.labels, second.labels)
    whole = build(folder, **way)
    list(islice(whole.train_batches(), 40))
    assert as_json(whole.state_dict()) == state


def test_rows_before_the_damage_are_used_and_neighbours_are_whole(tmp_path: Path) -> None:
    texts = make_texts(5000, longest=20)
    path = write(tmp_path / "a.parquet", texts, group=4000, data_page_size=4096, **PLAIN)
    flip(path, group=0)
    reader, skipped, damage = RowReader(open_source(str(path))), Counter[str](), {}
    found: list[str | None] = []
    for start in range(0, 4000, 250):
        found += reader.read(Span(0, start, start + 250), None, skipped, damage)
    found += reader.read(Span(1, 0, 1000), None, skipped, damage)
    lost = skipped["in a damaged row group"]
    assert 0 < lost < 4000 and lost % 1024 == 4000 % 1024
    assert found == [*texts[: 4000 - lost], *[None] * lost, *texts[4000:]]
    assert list(damage) == [f"{path}: row group 0"]
    again = RowReader(open_source(str(path)))
    assert again.read(Span(0, 3500, 4000), None, skipped) == [None] * 500
    assert again.read(Span(0, 0, 500), None, skipped) == texts[:500]


@WAYS
def test_error_ends_the_run_at_the_first_of_them_with_its_place(tmp_path: Path, way: dict[str, Any]) -> None:
    texts: list[str | None] = [*make_texts(60)]
    texts[33] = " "
    path = write(tmp_path / "data/a.parquet", texts, group=20)
    with pytest.raises(DataError, match=r"a\.parquet: row group 1, row 13: empty; .* set it to skip"):
        one_epoch(build(tmp_path, on_bad_data="error", **way))
    flip(path, group=0)
    with pytest.raises(DataError, match=r"a\.parquet: row group 0 is damaged"):
        one_epoch(build(tmp_path, on_bad_data="error", **way))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"a\.parquet: not a readable Parquet file"):
        build(tmp_path, on_bad_data="error", **way)


def test_error_refuses_a_cache_that_was_made_while_skipping(tmp_path: Path) -> None:
    write(tmp_path / "data/a.parquet", [*make_texts(60), None, ""])
    assert build(tmp_path).stats["skipped"] == {"null": 1, "empty": 1}
    with pytest.raises(DataError, match=r"on_bad_data: is error, but .*1 empty, 1 null"):
        build(tmp_path, on_bad_data="error")


def test_when_no_file_is_whole_the_run_does_not_start(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"data/{name}.parquet").parent.mkdir(exist_ok=True)
        (tmp_path / f"data/{name}.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"a\.parquet: not a readable Parquet file .*\(and 1 more: none of the files"):
        build(tmp_path)


def test_a_file_put_right_is_other_data(folder: Path) -> None:
    state = build(folder).state_dict()
    write(folder / "data/b.parquet", make_texts(100))
    with pytest.raises(DataError, match=r"data: saved \w{12}, now \w{12}"):
        build(folder).load_state_dict(state)


def test_a_missing_column_is_an_error_even_in_one_file(tmp_path: Path) -> None:
    write(tmp_path / "data/a.parquet", make_texts(60))
    write(tmp_path / "data/b.parquet", make_texts(60), column="texto")
    with pytest.raises(DataError, match=r"b\.parquet: no column 'text'; did you mean 'texto'\?"):
        build(tmp_path)


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), PermissionError(errno.EACCES, "no"), pa.ArrowMemoryError("x")]
)
def test_trouble_of_the_machine_is_never_taken_for_bad_data(error: Exception) -> None:
    with pytest.raises(DataError, match="the machine, not the data") as caught, damage_told("a", "b"):
        raise error
    assert type(caught.value) is DataError


def test_a_row_of_a_megabyte_is_cut_into_rows_like_any_other(tmp_path: Path) -> None:
    text = " ".join(make_texts(1, longest=2)) + " the king" * 120_000
    pq.write_table(pa.table({"text": [text, *make_texts(30)]}), (tmp_path / "d.parquet"))
    data = build(tmp_path, local_parquet_dir=str(tmp_path / "d.parquet"))
    assert data.stats["tokens"] > 240_000 and data.rows_per_epoch > 5_000
    assert next(data.train_batches()).input_ids.shape == (7, 48)
