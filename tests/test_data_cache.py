"""The cache: made once, complete or absent, never stale, shared by processes, held to its checksums."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
from data_files import as_json, build, make_texts, settings, write

from ultrazoo.data import build_data, cache
from ultrazoo.data.sources import Span
from ultrazoo.data.stores import Documents, TokenStore
from ultrazoo.errors import DataError


def documents(data) -> list[list[int]]:  # type: ignore[no-untyped-def]
    """All training and held-out documents of a store, row group by row group."""
    found = []
    for unit, rows in enumerate(data.source.unit_rows.tolist()):
        for held_out in (False, True):
            docs: Documents = data.store.read([Span(unit, 0, rows)], held_out=held_out).documents
            found += [docs.ids[s : s + n].tolist() for s, n in zip(docs.starts, docs.lengths, strict=True) if n]
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "data/a.parquet", make_texts(200), group=30)
    write(tmp_path / "data/b.parquet", [*make_texts(99, seed=1), None], group=30)
    return tmp_path


def caches(folder: Path) -> list[Path]:
    return sorted(path.parent for path in (folder / "cache").glob("*/manifest.json"))


def test_it_is_made_once_and_used_after(folder: Path) -> None:
    lines: list[str] = []
    first = build(folder, lines)
    assert any("tokenised 299 rows" in line for line in lines) and "data: skipped 1 row (1 null)" in lines
    before = {path: path.stat().st_mtime_ns for path in caches(folder)[0].iterdir()}
    lines.clear()
    second = build(folder, lines)
    assert not any("tokenised" in line for line in lines) and "data: skipped 1 row (1 null)" in lines
    assert {path: path.stat().st_mtime_ns for path in caches(folder)[0].iterdir()} == before
    assert second.stats == first.stats and first.stats["rows"] == 300 and documents(first) == documents(second)


def test_it_holds_what_streaming_reads(folder: Path) -> None:
    streamed = build(folder, stream_local_parquet=True)
    assert not caches(folder)
    assert documents(build(folder)) == documents(streamed) != []


def test_streaming_uses_a_complete_cache_unless_told_not_to(folder: Path) -> None:
    build(folder)
    assert isinstance(build(folder, stream_local_parquet=True).store, TokenStore)
    assert not isinstance(build(folder, stream_local_parquet=True, prefer_local_cache=False).store, TokenStore)


def test_other_data_settings_or_tokenizer_never_meet_it(folder: Path) -> None:
    build(folder)
    for changes in ({"max_samples": 250}, {"max_samples": None, "tokenizer": None}):
        count = len(caches(folder))
        build(folder, **changes)
        assert len(caches(folder)) == count + 1
    write(folder / "data/b.parquet", make_texts(100, seed=2), group=30)
    assert documents(build(folder)) == documents(build(folder, stream_local_parquet=True, prefer_local_cache=False))


def reverse(path: Path) -> None:
    """Put the bytes of a file in the opposite order; the size stays."""
    path.write_bytes(path.read_bytes()[::-1])


@pytest.mark.parametrize("name", ["shard-00000.tokens", "shard-00000.offsets", "shard-00000.counts", "counts"])
def test_a_changed_file_of_the_same_size_is_named_and_the_cache_rebuilt(folder: Path, name: str) -> None:
    good = documents(build(folder))
    content = (caches(folder)[0] / name).read_bytes()
    reverse(caches(folder)[0] / name)
    lines: list[str] = []
    assert documents(build(folder, lines)) == good
    [told] = [line for line in lines if "rebuilt" in line]
    assert told.startswith(f"warning: cache {caches(folder)[0]}: {name} has CRC-32 ")
    assert (caches(folder)[0] / name).read_bytes() == content
    lines.clear()
    build(folder, lines)
    assert not any("rebuilt" in line for line in lines)


def test_a_file_cut_short_missing_or_a_damaged_manifest_is_rebuilt_too(folder: Path) -> None:
    good = documents(build(folder))
    tokens, manifest = (caches(folder)[0] / name for name in ("shard-00000.tokens", "manifest.json"))
    size = tokens.stat().st_size
    for change, said in (
        (lambda: tokens.write_bytes(tokens.read_bytes()[:-2]), f"has {size - 2} bytes, expected {size}; rebuilt"),
        (tokens.unlink, "shard-00000.tokens cannot be read (No such file or directory); rebuilt"),
        (lambda: manifest.write_bytes(manifest.read_bytes()[:-2]), "manifest.json is damaged; rebuilt"),
        (manifest.unlink, "not complete; rebuilt"),
    ):
        change()
        lines: list[str] = []
        assert documents(build(folder, lines)) == good and any(said in line for line in lines), lines


def test_streaming_does_without_a_changed_cache_and_says_so(folder: Path) -> None:
    good = documents(build(folder))
    reverse(caches(folder)[0] / "shard-00000.tokens")
    lines: list[str] = []
    data = build(folder, lines, stream_local_parquet=True)
    assert not isinstance(data.store, TokenStore) and documents(data) == good
    assert any("has CRC-32" in line and line.endswith("; not used") for line in lines)


def test_ids_that_go_bad_while_it_is_open_are_an_error(folder: Path) -> None:
    data = build(folder)
    content = np.memmap(caches(folder)[0] / "shard-00000.tokens", np.uint16, "r+")
    content[:] = 9000
    with pytest.raises(DataError, match=r"holds id 9000, expected ids below 8192: the cache is damaged; delete"):
        documents(data)


def test_a_job_of_many_processes_rebuilds_it_once(folder: Path) -> None:
    good = documents(build(folder))

    def rebuilt(job: str) -> list[bool]:
        told: list[list[str]] = [[], []]
        for lines in told:
            data = build_data(settings(folder, prefer_local_cache=False), 8192, lines.append, job)
            assert documents(data) == good
        return [any("rebuilt as asked" in line for line in lines) for lines in told]

    assert rebuilt("first") == [True, False]
    assert rebuilt("second") == [True, False]
    assert rebuilt("") == [True, True], "processes that nothing joins"
    reverse(caches(folder)[0] / "counts")
    assert rebuilt("third") == [True, False]


def test_an_interrupted_build_goes_on_where_it_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build(folder)
    (folder / "cache").rename(folder / "old")
    monkeypatch.setattr(cache, "SHARD_TOKENS", 3000)
    encode, calls = cache.Encoder.encode, []

    def stopping(self, texts):  # type: ignore[no-untyped-def]
        calls.append(len(texts))
        if len(calls) == 6:
            raise KeyboardInterrupt
        return encode(self, texts)

    monkeypatch.setattr(cache.Encoder, "encode", stopping)
    with pytest.raises(KeyboardInterrupt):
        build(folder)
    [partial] = (folder / "cache").glob("*.partial")
    assert not caches(folder) and len(list(partial.glob("shard-*.json"))) == 2
    reverse(partial / "shard-00001.tokens")
    whole_units = json.loads((partial / "shard-00000.json").read_bytes())["units"][1]
    lines: list[str] = []
    resumed = build(folder, lines)
    assert any(f"going on after {whole_units} of" in line for line in lines), lines
    assert len(resumed.store.manifest["shards"]) > 2 and not list((folder / "cache").glob("*.partial"))
    assert documents(resumed) == documents(whole) and resumed.stats == whole.stats
    assert np.array_equal(resumed.store.counts, whole.store.counts)
    assert as_json(resumed.store.manifest) == resumed.store.manifest


def _build_and_report(folder: Path, queue: multiprocessing.Queue[tuple[str, list[str]]]) -> None:
    lines: list[str] = []
    data = build_data(settings(folder), 8192, lines.append)
    queue.put((str(documents(data)), lines))


def test_two_processes_make_one_cache(folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[tuple[str, list[str]]] = context.Queue()
    processes = [context.Process(target=_build_and_report, args=(folder, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    (first, first_lines), (second, second_lines) = queue.get(timeout=60), queue.get(timeout=60)
    for process in processes:
        process.join()
    assert first == second and len(caches(folder)) == 1
    assert sum("tokenised 299 rows" in line for line in first_lines + second_lines) == 1


def test_a_folder_that_cannot_be_written_or_is_full_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "file").write_text("")
    with pytest.raises(DataError, match=r"training\.cache_dir: .*file.*stream_local_parquet"):
        build(folder, cache_dir=str(folder / "file"))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match=r"training\.cache_dir: .*No space left on device.*free some space"):
            build(folder)
    assert not caches(folder) and not list((folder / "cache").glob("*.partial/shard*"))
    build(folder)
    assert len(caches(folder)) == 1


def test_the_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.default_cache_dir() == tmp_path / "ultrazoo" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    assert cache.default_cache_dir() == tmp_path / "home" / ".cache" / "ultrazoo" / "data"
