"""Data that changes between two starts or during a run, and caches that are cut short while they are used."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_files import as_json, build, make_texts, originals, settings, write

from ultrazoo.data import DataModule, build_data, digests
from ultrazoo.data.cache import build_cache, cache_folder
from ultrazoo.data.digests import SAMPLED_FROM, Digests, sampled_digest
from ultrazoo.data.sources import Span, open_source
from ultrazoo.data.tokenizer import find_vocabulary
from ultrazoo.errors import DataError

STREAMED = {"stream_local_parquet": True, "prefer_local_cache": False}
SECRET, REDACTED = b"Margarita Reyes", b"xxxxxxxxx xxxxx"


def documents(data: DataModule) -> str:
    """The tokens of all documents of a store."""
    spans = [Span(unit, 0, rows) for unit, rows in enumerate(data.source.unit_rows.tolist())]
    readings = [data.store.read(spans, held_out=held_out).documents for held_out in (False, True)]
    return str(
        [docs.ids[s : s + n].tolist() for docs in readings for s, n in zip(docs.starts, docs.lengths, strict=True)]
    )


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder whose ``data`` is one file over 64 MiB, with a name in its text that no sample of it holds."""
    path = tmp_path_factory.mktemp("large") / "data/a.parquet"
    path.parent.mkdir()
    texts = [f"{text} Margarita Reyes" for text in make_texts(400, longest=200)]
    filling = pa.array([bytes(SAMPLED_FROM // 400 + 1000)] * 400, pa.binary())
    plain = {"compression": "none", "use_dictionary": False}
    pq.write_table(pa.table({"text": texts, "filling": filling}), path, row_group_size=400, **plain)
    return path.parents[1]


def redact(path: Path) -> None:
    """Change a name in place, with a time of modification that is put back."""
    before = path.stat()
    with path.open("r+b") as file:
        head = file.read(1 << 19)
        place = head.index(SECRET, 100 << 10)
        file.seek(place)
        file.write(REDACTED)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size and path.stat().st_mtime_ns == before.st_mtime_ns


def test_text_redacted_in_place_in_a_large_file_is_neither_cached_nor_resumed(large: Path) -> None:
    path = large / "data/a.parquet"
    first = build(large)
    state, before = as_json(first.state_dict()), documents(first)
    build(large).load_state_dict(state)
    samples = sampled_digest(path)
    redact(path)
    assert sampled_digest(path) == samples, "the samples of earlier versions do not see it"
    second = build(large)
    assert documents(second) != before
    assert documents(second) == documents(build(large, **STREAMED))
    with pytest.raises(DataError, match=r"data: saved \w{12}, now \w{12}"):
        second.load_state_dict(state)


def test_a_checkpoint_of_an_earlier_version_is_compared_by_samples_and_its_cache_is_made_again(large: Path) -> None:
    lines: list[str] = []
    data = build(large)
    sampled = data.source.fingerprint_by(1)
    assert sampled != data.fingerprint
    earlier = as_json(data.state_dict()) | {"fingerprint": sampled}
    with pytest.raises(DataError, match="data: saved"):
        data.load_state_dict(earlier)
    del earlier["hashing"], earlier["discovery"]
    build(large, lines).load_state_dict(earlier)
    [warning] = [line for line in lines if "earlier version" in line]
    assert (
        warning.startswith("warning: data: the checkpoint is of an earlier version")
        and "samples of a.parquet" in warning
    )
    with pytest.raises(DataError, match="data: saved"):
        data.load_state_dict(earlier | {"fingerprint": "0" * 64})
    folder = next(path.parent for path in (large / "cache").glob("*/manifest.json"))
    folder.rename(cache_folder(large / "cache", sampled, data.vocabulary))
    lines.clear()
    rebuilt = build(large, lines)
    assert documents(rebuilt) == documents(data)
    assert any("made by an earlier version" in line and "not used" in line and "delete it" in line for line in lines)
    assert any("tokenised 400 rows" in line for line in lines)


def test_a_hash_is_remembered_while_the_file_stays_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, known = tmp_path / "a.parquet", tmp_path / "digests"
    path.write_bytes(bytes(digests.REMEMBERED_FROM))
    _, right = Digests(known).of(path)
    assert not known.exists(), "a change in the same instant would have the same time"
    monkeypatch.setattr(digests, "SETTLED_NS", -1)
    assert Digests(known).of(path)[1] == right
    [record] = known.iterdir()

    def forge() -> None:
        record.write_text(json.dumps(json.loads(record.read_text()) | {"sha256": "remembered"}))

    forge()
    assert Digests(known).of(path)[1] == "remembered"
    (tmp_path / "b").write_bytes(bytes(digests.REMEMBERED_FROM))
    for change in (
        path.touch,
        lambda: path.chmod(0o600),
        lambda: (tmp_path / "b").replace(path),
        lambda: record.write_text("{"),
    ):
        change()
        assert Digests(known).of(path)[1] == right
        forge()
    (tmp_path / "file").write_text("")
    unkept = Digests(tmp_path / "file")
    assert unkept.of(path)[1] == right and "file" in unkept.problem


def test_a_cache_folder_that_cannot_be_written_is_told_and_streaming_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "SETTLED_NS", -1)
    monkeypatch.setattr(digests, "REMEMBERED_FROM", 0)
    write(tmp_path / "data/a.parquet", make_texts(50))
    (tmp_path / "cache").write_text("")
    lines: list[str] = []
    next(build(tmp_path, lines, **STREAMED).train_batches())
    assert any(line.startswith("warning: data: the hashes of large files are not kept: ") for line in lines)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    texts = make_texts(600, longest=40)
    for number, name in enumerate("abc"):
        write(tmp_path / f"data/{name}.parquet", texts[200 * number : 200 * number + 200], group=40)
    return tmp_path


def replaced(path: Path, table: Any) -> None:
    write(path.with_name("new"), table, group=40).replace(path)


CHANGES: dict[str, Callable[[Path], None]] = {
    "replaced": lambda path: replaced(path, [f"otro texto {number}" for number in range(200)]),
    "rewritten in place": lambda path: path.write_bytes(path.read_bytes()[::-1]),
    "cut short": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "without its column": lambda path: replaced(path, pa.table({"texto": make_texts(200)})),
    "fewer row groups": lambda path: replaced(path, ["una fila"]),
    "of another type": lambda path: replaced(path, pa.table({"text": list(range(200))})),
}


def rest_of_epoch(data: DataModule, batches: Iterator[Any]) -> list[Any]:
    found = []
    for batch in batches:
        found.append(batch)
        if data.epoch >= 1:
            return found
    raise AssertionError("batches never end")


def pieces(batches: list[Any]) -> set[tuple[int, ...]]:
    return {tuple(piece) for batch in batches for piece in originals(batch)}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_while_it_is_streamed_is_not_trained_on(folder: Path, change: str) -> None:
    lines: list[str] = []
    whole = {**STREAMED, "max_length": 256, "pack_sequences": False}
    untouched, data = build(folder, **whole), build(folder, lines, **whole)
    expected = pieces(rest_of_epoch(untouched, untouched.train_batches()))
    batches = data.train_batches()
    found = list(islice(batches, 20))
    CHANGES[change](folder / "data/b.parquet")
    found += rest_of_epoch(data, batches)
    lost = data.stats["skipped"]["in a file that changed during the run"]
    assert 0 < lost < 200 and len(data.stats["skipped"]) == 1
    assert pieces(found) < expected and len(pieces(found)) == len(expected) - lost
    assert list(data.stats["damage"]) == [str(folder / "data/b.parquet")]
    [warning] = [line for line in lines if "is not what it was when the run began" in line]
    assert warning.startswith("warning: data: ") and "put the file back and resume" in warning


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("change", ["replaced", "cut short", "without its column"])
def test_under_error_it_ends_the_run(folder: Path, change: str, workers: int) -> None:
    data = build(folder, on_bad_data="error", dataloader_workers=workers, **STREAMED)
    batches = data.train_batches()
    list(islice(batches, 3))
    CHANGES[change](folder / "data/b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet: is not what it was when the run began: .*; put the file back"):
        rest_of_epoch(data, batches)


def test_a_file_that_is_touched_or_copied_again_is_the_same(folder: Path) -> None:
    expected = list(islice(build(folder, **STREAMED).train_batches(), 60))
    data = build(folder, on_bad_data="error", **STREAMED)
    batches = data.train_batches()
    found = list(islice(batches, 3))
    content = (folder / "data/b.parquet").read_bytes()
    (folder / "data/a.parquet").touch()
    (folder / "data/new").write_bytes(content)
    (folder / "data/new").replace(folder / "data/b.parquet")
    found += list(islice(batches, 57))
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(expected, found, strict=True))


def test_a_file_that_is_removed_ends_the_run_with_its_name(folder: Path) -> None:
    data = build(folder, **STREAMED)
    batches = data.train_batches()
    next(batches)
    (folder / "data/b.parquet").unlink()
    with pytest.raises(DataError, match=r"b\.parquet: .*No such file"):
        rest_of_epoch(data, batches)


@pytest.mark.parametrize("change", ["replaced", "cut short"])
def test_a_cache_or_tokenizer_is_not_made_of_a_file_that_has_changed(folder: Path, change: str) -> None:
    source = open_source(str(folder / "data"))
    vocabulary = build(folder, **STREAMED).vocabulary
    CHANGES[change](folder / "data/b.parquet")
    options = {"console": lambda line: None, "threads": 1}
    with pytest.raises(DataError, match=r"b\.parquet: is not what it was when the run began"):
        build_cache(folder / "cache/x", source, vocabulary, rows_at_once=64, rebuild=False, **options)
    assert not (folder / "cache/x").exists()
    with pytest.raises(DataError, match=r"b\.parquet: is not what it was when the run began"):
        find_vocabulary(source, given=None, vocab_size=300, cache_dir=folder / "cache", **options)
    assert not list((folder / "cache").glob("tokenizers/*.json"))


def test_a_file_that_is_still_being_written_is_refused_at_the_start(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "data/b.parquet"
    read = Digests.of

    def appended(self: Digests, path_: Path, *arguments: Any) -> Any:
        if path_ == path:
            with path.open("ab") as file:
                file.write(b"more")
        return read(self, path_, *arguments)

    monkeypatch.setattr(Digests, "of", appended)
    with pytest.raises(DataError, match=r"b\.parquet: was written while it was read; expected a complete file"):
        build(folder)


@pytest.mark.parametrize("name", ["shard-00000.tokens", "shard-00000.offsets"])
@pytest.mark.parametrize("size", [0, 4096, -8])
def test_a_cache_that_is_cut_short_while_it_is_used_is_an_error(folder: Path, name: str, size: int) -> None:
    data = build(folder)
    path = next((folder / "cache").glob(f"*/{name}"))
    whole = path.stat().st_size
    left = size if size >= 0 else whole + size
    os.truncate(path, left)
    with pytest.raises(DataError, match=rf"{name}: has {left} bytes, expected {whole}: .*resume the run"):
        documents(data)
    lines: list[str] = []
    assert documents(build(folder, lines)) == documents(build(folder, **STREAMED))
    assert any("rebuilt" in line for line in lines)


def test_positions_that_go_bad_while_a_cache_is_used_are_an_error(folder: Path) -> None:
    data = build(folder)
    path = next((folder / "cache").glob("*/shard-00000.offsets"))
    content = path.read_bytes()
    for changed in (content[:8] + b"\xff" * (len(content) - 8), content[:-8] + b"\x7f" * 8):
        path.write_bytes(changed)
        with pytest.raises(DataError, match=r"shard-00000\.offsets holds positions outside of .* delete the folder"):
            documents(data)


def test_a_cache_that_is_removed_while_it_is_used_is_read_to_the_end(folder: Path) -> None:
    data = build(folder)
    expected = documents(data)
    for path in (folder / "cache").glob("*/*"):
        path.unlink()
    assert documents(data) == expected


def test_a_run_of_an_earlier_version_keeps_its_files(tmp_path: Path) -> None:
    texts, lines = make_texts(90), []
    write(tmp_path / "data/a.parquet", texts[:40])
    same = build_data(settings(tmp_path), 8192, lines.append, resumed={"fingerprint": ""})
    assert as_json(same.state_dict())["discovery"] == 2 and not any("earlier rule" in line for line in lines)
    write(tmp_path / "data/_b.parquet", texts[40:80])
    write(tmp_path / "data/c.PQ", texts[80:])
    assert build(tmp_path, lines).source.num_rows == 50
    resumed = build_data(settings(tmp_path), 8192, lines.append, resumed={"fingerprint": ""})
    assert [file.name for file in resumed.source.files] == ["_b.parquet", "a.parquet"]
    assert any("an earlier rule of which files are read, and keeps it: 2 file(s)" in line for line in lines)
    state = as_json(resumed.state_dict())
    assert state["discovery"] == 1
    build_data(settings(tmp_path), 8192, lines.append, resumed=state).load_state_dict(state)
    for name in ("discovery", "hashing"):
        with pytest.raises(
            DataError, match=rf"data state: got {name} 99, expected at most 2; it is of a later version"
        ):
            build_data(settings(tmp_path), 8192, lines.append, resumed=state | {name: 99})
