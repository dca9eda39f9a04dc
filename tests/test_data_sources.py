"""Parquet in: files found in order, defects named at the start, unusable rows counted."""

from __future__ import annotations

import errno
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from data_files import build, flip, make_texts, write

from ultrazoo.config.paths import absolute
from ultrazoo.data.reading import RowReader
from ultrazoo.data.sources import ParquetSource, Span, open_source
from ultrazoo.errors import DataError


def read_all(source: ParquetSource) -> tuple[list[str | None], Counter[str]]:
    reader, skipped = RowReader(source), Counter[str]()
    spans = [Span(unit, 0, rows) for unit, rows in enumerate(source.unit_rows.tolist())]
    return [text for span in spans for text in reader.read(span, None, skipped)], skipped


def test_a_file_a_folder_and_a_glob_are_read_in_order_of_name(tmp_path: Path) -> None:
    texts = make_texts(30)
    for name, part in {"b/2.parquet": texts[20:], "a.parquet": texts[:10], "b/1.parquet": texts[10:20]}.items():
        write(tmp_path / name, part, group=4)
    (tmp_path / "notes.txt").write_text("not data")
    assert read_all(open_source(str(tmp_path)))[0] == texts
    assert read_all(open_source(str(tmp_path / "**/*.parquet")))[0] == texts
    assert read_all(open_source(str(tmp_path / "b/*.parquet")))[0] == texts[10:]
    assert read_all(open_source(str(tmp_path / "a.parquet")))[0] == texts[:10]
    assert [file.name for file in open_source(str(tmp_path)).files] == ["a.parquet", "b/1.parquet", "b/2.parquet"]


def test_linked_folders_are_entered_once_and_change_no_name_of_a_tree_without_them(tmp_path: Path) -> None:
    texts, data = make_texts(30), tmp_path / "data"
    write(tmp_path / "elsewhere/deep/2.parquet", texts[20:])
    write(data / "b/1.parquet", texts[10:20])
    write(tmp_path / "a.parquet", texts[:10])
    before = open_source(str(data))
    write(data / "lost+found/9.parquet", texts)
    (data / "again").symlink_to(data / "b")
    (data / "b/round").symlink_to(data)
    assert open_source(str(data)).fingerprint == before.fingerprint
    (data / "c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(data)
    (data / "a.parquet").symlink_to(tmp_path / "a.parquet")
    source = open_source(str(data))
    assert [file.name for file in source.files] == ["a.parquet", "b/1.parquet", "c/deep/2.parquet"]
    assert read_all(source)[0] == texts


@pytest.mark.parametrize(
    "location", ["data", "data/a.parquet", "data/*.parquet", "*/a.parquet", "**/*.parquet", "../run[[]1]/da*/*"]
)
def test_a_relative_location_and_its_absolute_form_are_the_same_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str
) -> None:
    write(tmp_path / "run[1]/data/a.parquet", make_texts(10))
    monkeypatch.chdir(tmp_path / "run[1]")
    relative, whole = open_source(location), absolute(location)
    monkeypatch.chdir("/")
    assert open_source(whole).fingerprint == relative.fingerprint


def test_a_location_that_no_system_has_is_an_error() -> None:
    for location in ("x" * 300, "~" + "x" * 30 + "/data"):
        with pytest.raises(DataError, match=r"training\.local_parquet_dir: .*cannot be looked up"):
            open_source(location)


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.parquet", ["x"])
    write(tmp_path / "shut/b.parquet", ["y"])
    scandir = os.scandir

    def guarded(place: str) -> Any:
        if str(place).endswith("shut"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(DataError, match=r"shut: the folder cannot be read \(Permission denied\)"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("where", ["", "*.parquet"])
def test_a_link_that_leads_nowhere_is_a_damaged_file(tmp_path: Path, where: str) -> None:
    data = tmp_path / "data"
    write(data / "a.parquet", make_texts(60))
    (data / "b.parquet").symlink_to(tmp_path / "gone.parquet")
    (data / "c.parquet").symlink_to(data / "c.parquet")
    location = str(data / where) if where else str(data)
    with pytest.raises(DataError, match=r"b\.parquet: a link to \S*gone\.parquet, which is not there; expected a Parq"):
        open_source(location, on_bad_data="error")
    lines: list[str] = []
    loaded = build(tmp_path, lines, local_parquet_dir=location)
    assert list(loaded.stats["damaged_files"]) == ["b.parquet", "c.parquet"]
    assert any("b.parquet: a link to" in line and "skipped" in line for line in lines)
    assert loaded.left_out == "2 files"
    before = loaded.fingerprint
    write(tmp_path / "gone.parquet", make_texts(10))
    assert open_source(location).fingerprint != before, "put right, it is other data"


def test_the_embedded_corpus_is_there_and_whole() -> None:
    source = open_source(None)
    assert source.is_embedded and source.num_rows == 6941
    texts, skipped = read_all(source)
    assert (
        not skipped
        and any("corazón" in text for text in texts if text)
        and any("Emma" in text for text in texts if text)
    )


def test_spans_are_read_forwards_backwards_and_side_by_side(tmp_path: Path) -> None:
    texts = make_texts(100)
    reader, skipped = RowReader(open_source(str(write(tmp_path / "a.parquet", texts, group=50)))), Counter[str]()
    for span in [Span(0, 10, 20), Span(1, 0, 7), Span(0, 20, 30), Span(1, 40, 50), Span(0, 0, 50), Span(1, 3, 4)]:
        first = 50 * span.unit
        assert reader.read(span, None, skipped) == texts[first + span.start : first + span.stop]


@pytest.mark.parametrize("content", [b"", b"plain text", b"PAR1 and nothing more"], ids=["empty", "text", "magic only"])
def test_what_is_not_parquet_is_named(tmp_path: Path, content: bytes) -> None:
    write(tmp_path / "a.parquet", ["x"])
    bad = tmp_path / "b.parquet"
    bad.write_bytes(content)
    with pytest.raises(DataError, match=rf"{re.escape(str(bad))}: not a readable Parquet file.*copy it again"):
        open_source(str(tmp_path), on_bad_data="error")


def test_a_file_cut_short_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", make_texts(50))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"a\.parquet: not a readable Parquet file.*cut short"):
        open_source(str(path))


def test_no_files_missing_column_and_no_text_are_errors_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"local_parquet_dir: .*empty: no Parquet file in it.*ultrazoo data convert"):
        open_source(str(tmp_path / "empty"))
    with pytest.raises(DataError, match="no such file, folder or match"):
        open_source(str(tmp_path / "*.parquet"))
    path = write(tmp_path / "a.parquet", ["x"], column="texts")
    with pytest.raises(DataError, match=r"no column 'text'; did you mean 'texts'\?.*texts \(string\), other \(int64\)"):
        open_source(str(path))
    with pytest.raises(DataError, match=r"column 'other' holds no text.*texts \(string\)"):
        open_source(str(path), "other")
    with pytest.raises(DataError, match="without a single row"):
        open_source(str(write(tmp_path / "none.parquet", pa.table({"text": pa.array([], pa.string())}))))


def test_unusable_rows_are_counted_by_reason_and_the_rest_is_used(tmp_path: Path) -> None:
    raw = [b"uno", None, b"", b"  \n", b"caf\xc3\xa9", b"caf\xe9", b"dos"]
    for name, kind in {"string": pa.string(), "large": pa.large_string(), "binary": pa.binary()}.items():
        array = pa.array(raw, pa.large_binary() if name == "large" else pa.binary())
        if name != "binary":  # Arrow does not check text that it reads: a file may say string and hold anything
            array = pa.Array.from_buffers(kind, len(array), array.buffers())
        path = write(tmp_path / f"{name}.parquet", pa.table({"text": array}))
        texts, skipped = read_all(open_source(str(path)))
        assert texts == ["uno", None, None, None, "café", None, "dos"]
        assert skipped == {"null": 1, "empty": 2, "invalid UTF-8": 1}


def test_files_of_other_types_are_counted_not_fatal(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [1, 2, 3])
    write(tmp_path / "b.parquet", pa.table({"text": pa.nulls(2)}))
    write(tmp_path / "c.parquet", pa.table({"text": pa.array(["uno", "dos"]).dictionary_encode()}))
    assert read_all(open_source(str(tmp_path))) == ([None] * 5 + ["uno", "dos"], {"not text": 3, "null": 2})


def test_data_without_a_usable_row_is_an_error_before_training(tmp_path: Path) -> None:
    write(tmp_path / "data/a.parquet", pa.table({"text": pa.array([None, "", " "])}))
    for streaming in (False, True):
        with pytest.raises(DataError, match=r"no usable row to train on among 3 \(skipped: .*null"):
            build(tmp_path, stream_local_parquet=streaming)


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_a_damaged_row_group_is_named_and_its_neighbours_are_readable(tmp_path: Path, compression: str) -> None:
    texts = make_texts(90)
    path = write(tmp_path / "a.parquet", texts, group=30, compression=compression, use_dictionary=False)
    flip(path, group=1)
    reader, skipped = RowReader(open_source(str(path), on_bad_data="error")), Counter[str]()
    with pytest.raises(DataError, match=rf"{re.escape(str(path))}: row group 1 is damaged"):
        reader.read(Span(1, 0, 30), None, skipped)
    assert reader.read(Span(0, 0, 30), None, skipped) == texts[:30]
    assert reader.read(Span(2, 0, 30), None, skipped) == texts[60:]


def test_max_samples_takes_the_first_rows(tmp_path: Path) -> None:
    texts = make_texts(100)
    write(tmp_path / "a.parquet", texts[:60], group=25)
    write(tmp_path / "b.parquet", texts[60:], group=25)
    for limit in (1, 25, 60, 70, 100, 1000):
        source = open_source(str(tmp_path), max_samples=limit)
        assert source.num_rows == min(limit, 100)
        assert read_all(source)[0] == texts[:limit]


def test_the_fingerprint_follows_contents_and_names_not_times_or_places(tmp_path: Path) -> None:
    texts = make_texts(60)
    write(tmp_path / "x/a.parquet", texts)
    first = open_source(str(tmp_path / "x")).fingerprint
    (tmp_path / "x").rename(tmp_path / "y")
    os.utime(tmp_path / "y/a.parquet", (1, 1))
    assert open_source(str(tmp_path / "y")).fingerprint == first
    assert open_source(str(tmp_path / "y"), max_samples=10).fingerprint != first
    assert open_source(str(tmp_path / "y"), max_samples=None, text_column="text").fingerprint == first
    (tmp_path / "y/a.parquet").rename(tmp_path / "y/b.parquet")
    assert open_source(str(tmp_path / "y")).fingerprint != first
    (tmp_path / "y/b.parquet").rename(tmp_path / "y/a.parquet")
    size = (tmp_path / "y/a.parquet").stat().st_size
    flip(tmp_path / "y/a.parquet", group=0)
    assert (tmp_path / "y/a.parquet").stat().st_size == size
    assert open_source(str(tmp_path / "y")).fingerprint != first
