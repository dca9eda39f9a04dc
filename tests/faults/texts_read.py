"""Faults of the data: cut, damaged and unusable files, groups and rows; data that changes; positions; workers."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from faults.parts import Bench, checkpoints, dies_before, expect_equal, expect_whole, sets, texts, write_texts
from faults.process import check, executed, fork
from faults.registry import Came, fault

STREAMED = {"stream_local_parquet": True, "prefer_local_cache": False}


def end_of(chunk: Any) -> int:
    start = chunk.data_page_offset if chunk.dictionary_page_offset is None else chunk.dictionary_page_offset
    return start + chunk.total_compressed_size


def damage(path: Path, group: int, change: Callable[[bytearray, int, int], None]) -> None:
    """Change bytes of the text column of a row group."""
    chunk = pq.ParquetFile(path).metadata.row_group(group).column(0)
    content = bytearray(path.read_bytes())
    end = end_of(chunk)
    change(content, end - chunk.total_compressed_size, end)
    path.write_bytes(content)


def survives(
    bench: Bench, folder: Path, plant: Callable[[Path], None], words: list[str], **write: Any
) -> dict[str, Any]:
    """Train on damaged data, streamed and cached, killed and not; return the state of the last checkpoint."""
    data = folder / "data"

    def make() -> None:
        for number, name in enumerate("abc"):
            write_texts(data / f"{name}.parquet", texts(200, first=200 * number), **write)
        plant(data)

    fork(folder, make).wait().expect(0)
    base = {"local_parquet_dir": str(data), "cache_dir": str(folder / "cache"), "num_epochs": 1.6}
    base |= {"tokenizer": str(bench.straight / "tokenizer.json"), "max_steps": 90, "eval_every_n_steps": 90}
    state: dict[str, Any] = {}
    for name, way in (("streamed", STREAMED), ("cached", {})):
        options = sets(**base, **way, checkpoint_every_n_steps=25)
        bench.train(folder, name, *options).wait().expect(0, *words)
        broken = f"{name}-broken"
        bench.train(folder, broken, *options, hook=dies_before(60)).wait().expect(-signal.SIGKILL)
        bench.resume(folder, broken, *options, "--set", "training.dataloader_workers=1").wait().expect(0, *words[:1])
        expect_equal(folder / name, folder / broken)
        state = state or json.loads((checkpoints(folder / name)[-1] / "state.json").read_text())["data"]
    strict = sets(**base, on_bad_data="error", stream_local_parquet=True, prefer_local_cache=False)
    bench.train(folder, "strict", *strict).wait().expect(1, ".parquet")
    return state


@fault("18", "a Parquet file cut short")
def file_cut(bench: Bench, folder: Path) -> Came:
    def plant(data: Path) -> None:
        path = data / "b.parquet"
        path.write_bytes(path.read_bytes()[:-200])

    state = survives(bench, folder, plant, ["b.parquet: not a readable Parquet file", "skipped 1 file"])
    check(list(state["damaged_files"]) == ["b.parquet"], f"state: {state['damaged_files']}")
    return Came(
        "skipped, named and kept in the state; equal to the bit after a kill; on_bad_data error: exit 1", "1 of 3 files"
    )


def noise(content: bytearray, start: int, end: int) -> None:
    chance = random.Random(5)
    at = (start + end) // 2
    content[at : at + 64] = bytes(chance.randrange(256) for _ in range(64))


@fault("19", "64 random bytes in a snappy row group", quick=True)
def group_damaged(bench: Bench, folder: Path) -> Came:
    state = survives(
        bench,
        folder,
        lambda data: damage(data / "b.parquet", 1, noise),
        ["b.parquet: row group 1 is damaged", "in a damaged row group"],
        compression="snappy",
        write_page_checksum=False,
    )
    lost = state["skipped"]["in a damaged row group"]
    check(set(state["skipped"]) == {"in a damaged row group"} and 0 < lost <= 50, f"state: {state['skipped']}")
    return Came(
        "only that group is lost, named and counted; equal to the bit after a kill; error: exit 1",
        f"{lost} of 600 rows",
    )


@fault("20", "a bit flipped in an uncompressed page")
def page_flipped(bench: Bench, folder: Path) -> Came:
    def flip(content: bytearray, start: int, end: int) -> None:
        content[(start + end) // 2] ^= 1

    state = survives(
        bench,
        folder,
        lambda data: damage(data / "c.parquet", 2, flip),
        ["c.parquet: row group 2 is damaged", "in a damaged row group"],
        compression="none",
        use_dictionary=False,
    )
    lost = state["skipped"]["in a damaged row group"]
    return Came(
        "told by the page's checksum, which our converter writes; the group is lost and counted", f"{lost} of 600 rows"
    )


@fault("21", "unusable rows, a missing column, mixed schemas")
def rows(bench: Bench, folder: Path) -> Came:
    data = folder / "data"

    def make() -> None:
        raw: list[bytes | None] = [text.encode() for text in texts(150)]
        raw[3:7] = [None, b"", b"  \n", b"caf\xe9"]
        raw[20] = b"the king " * (10 << 20 >> 3)
        array = pa.array(raw, pa.large_binary())
        array = pa.Array.from_buffers(pa.large_string(), len(array), array.buffers())
        write_texts(data / "a.parquet", pa.table({"text": array}))
        write_texts(data / "b.parquet", pa.table({"text": pa.array([1, 2, 3])}))
        write_texts(folder / "other/a.parquet", pa.table({"texto": texts(20), "n": list(range(20))}))

    fork(folder, make).wait().expect(0)
    base = {"cache_dir": str(folder / "cache"), "tokenizer": str(bench.straight / "tokenizer.json"), "max_steps": 3}
    told = "7 rows (2 empty, 1 invalid UTF-8, 3 not text, 1 null)"
    bench.train(folder, "run", *sets(local_parquet_dir=str(data), **base)).wait().expect(0, told)
    strict = sets(local_parquet_dir=str(data), on_bad_data="error", **base, **STREAMED)
    bench.train(folder, "strict", *strict).wait().expect(1, "training.on_bad_data is error")
    missing = bench.train(folder, "missing", *sets(local_parquet_dir=str(folder / "other"), **base)).wait()
    missing.expect(1, "no column 'text'; did you mean 'texto'?", "n (int64)")
    return Came(
        "null, empty, non-text and invalid UTF-8 rows counted by reason; a row of 10 MB used; a missing column is an "
        "error at the start that lists the columns",
        "7 of 153 rows",
    )


@fault("22", "a file added, removed or renamed since the checkpoint", quick=True)
def files_changed(bench: Bench, folder: Path) -> Came:
    data = folder / "data"
    shutil.copytree(bench.root / "data", data)
    fork(folder, lambda: write_texts(data / "more.parquet", texts(100, first=900))).wait().expect(0)
    options = sets(local_parquet_dir=str(data), tokenizer=str(bench.straight / "tokenizer.json"))
    bench.train(folder, "straight", *options).wait().expect(0)
    bench.train(folder, "run", *options, hook=dies_before(14)).wait().expect(-signal.SIGKILL)
    shutil.copy(data / "more.parquet", data / "third.parquet")
    bench.resume(folder, "run", *options).wait().expect(1, "data_fingerprint: checkpoint")
    (data / "third.parquet").unlink()
    (data / "more.parquet").rename(folder / "more.parquet")
    bench.resume(folder, "run", *options).wait().expect(1, "data_fingerprint: checkpoint")
    (folder / "more.parquet").rename(data / "renamed.parquet")
    bench.resume(folder, "run", *options).wait().expect(1, "data_fingerprint: checkpoint")
    (data / "renamed.parquet").rename(data / "more.parquet")
    bench.resume(folder, "run", *options).wait().expect(0)
    expect_equal(folder / "straight", folder / "run")
    return Came("each refused by the fingerprint; put back, the run went on, equal to the bit", "nothing")


@fault("22b", "a shard of the token cache changed since the checkpoint, its size did not", quick=True)
def cache_changed(bench: Bench, folder: Path) -> Came:
    options = sets(cache_dir=str(folder / "cache"), tokenizer=str(bench.straight / "tokenizer.json"))
    bench.train(folder, "run", *options, hook=dies_before(14)).wait().expect(-signal.SIGKILL)
    [tokens] = (folder / "cache").glob("*/shard-00000.tokens")
    tokens.write_bytes(tokens.read_bytes()[::-1])
    bench.resume(folder, "run", *options).wait().expect(0, "shard-00000.tokens has CRC-32", "rebuilt")
    bench.expect_straight(folder / "run")
    return Came("told by the checksum of its manifest, built again; equal to the bit", "nothing")


def visit(bench: Bench, out: Path, state: Path | None, stop: int, **changes: Any) -> None:
    """Draw batches from a saved position on, and write down the rows they are made of and the position."""
    from ultrazoo.config import load_config
    from ultrazoo.data import build_data

    options = [word for word in sets(batch_size=7, **changes) if word != "--set"]
    training = load_config(bench.config, options).config.training
    data = build_data(training, 300, lambda line: None)
    if state is not None:
        data.load_state_dict(json.loads(state.read_text())["state"])
    ids: list[str] = []
    for count, batch in enumerate(data.train_batches(), 1):
        original = batch.input_ids.where(batch.labels == -100, batch.labels)
        for row, marks in zip(original.tolist(), batch.segments.tolist(), strict=True):
            pieces = [
                [t for t, m in zip(row, marks, strict=True) if m == number] for number in range(1, max(marks) + 1)
            ]
            ids += [data.tokenizer.decode(piece, skip_special_tokens=True).strip() for piece in pieces]
        if count == stop:
            break
    out.write_text(json.dumps({"state": data.state_dict(), "ids": ids, "epoch": data.epoch}))
    os.kill(os.getpid(), signal.SIGKILL)


def in_parts(bench: Bench, folder: Path, name: str, total: int, changes: dict[str, Any]) -> int:
    """Draw batches in one process and in many, each killed after writing its position; compare their rows."""

    def drawn(out: Path, state: Path | None, count: int) -> dict[str, Any]:
        fork(folder, lambda: visit(bench, out, state, count, **changes)).wait().expect(-signal.SIGKILL)
        return json.loads(out.read_text())

    whole = drawn(folder / f"{name}.json", None, total)
    check(whole["epoch"] > 1.2, f"only {whole['epoch']:.2f} epochs")
    found: list[str] = []
    state, before = None, 0
    for stop in (1, 7, 8, 9, 30, *range(38, 44), 55, total):
        out = folder / f"{name}-{stop}.json"
        found += drawn(out, state, stop - before)["ids"]
        state, before = out, stop
    check(found == whole["ids"], f"{name}: other rows, or in another order")
    heads = Counter(match[0] for piece in found if (match := re.match(r"n\d+", piece)))
    check(max(heads.values()) <= 2 and len(heads) > 300, f"{name}: {heads.most_common(3)}")
    return len(found)


@fault("24", "resume inside the shuffle window, at the end of an epoch, twice in a row")
def positions(bench: Bench, folder: Path) -> Came:
    count = in_parts(bench, folder, "cached", 60, {}) + in_parts(bench, folder, "streamed", 60, STREAMED)
    return Came(
        f"{count:,} pieces of rows over two ways to read, 13 kills each: the rows of the unbroken runs in their order",
        "0 lost, 0 twice",
    )


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@fault("25", "a data worker is killed")
def worker_killed(bench: Bench, folder: Path) -> Came:
    options = [*sets(dataloader_workers=2, max_steps=100_000), *sets(**STREAMED)]
    process = executed(folder, "train", bench.config, "--output-dir", "run", *options)
    process.until(lambda: checkpoints(folder / "run") and len(children(process.pid)) == 2)
    victim = children(process.pid)[1]
    begun = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    process.wait(60).expect(1, "training.dataloader_workers: DataLoader worker", str(victim))
    seconds = time.monotonic() - begun
    kept = expect_whole(folder / "run")
    step = int(kept[-1].name.removeprefix("step-"))
    bench.resume(folder, "run", *options, *sets(max_steps=step + 2)).wait().expect(0)
    return Came(
        f"exit 1 after {seconds:.1f} s, the worker's pid named; the last checkpoint whole; resumed", "steps since it"
    )


@fault("26", "one file with 8 workers; no file; no usable row", quick=True)
def few_files(bench: Bench, folder: Path) -> Came:
    bench.train(folder, "run", *sets(dataloader_workers=8)).wait().expect(0)
    bench.expect_straight(folder / "run")
    (folder / "empty").mkdir()
    bench.train(folder, "none", *sets(local_parquet_dir=str(folder / "empty"))).wait().expect(
        1, "no Parquet file in it"
    )
    fork(folder, lambda: write_texts(folder / "blank/a.parquet", pa.table({"text": pa.array([None, "", " "])}))).wait()
    blank = sets(local_parquet_dir=str(folder / "blank"), tokenizer=str(bench.straight / "tokenizer.json"))
    bench.train(folder, "blank", *blank, *sets(cache_dir=str(folder / "cache"))).wait().expect(1, "no usable row")
    return Came(
        "8 workers on one file equal none, to the bit; no file and no usable row are errors at the start", "nothing"
    )
