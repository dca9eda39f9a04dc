"""Tokenised shards on disk: complete under their key or not there at all."""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ultrazoo.caches import cache_home
from ultrazoo.data.encoding import Encoder
from ultrazoo.data.files import SummedFile, cache_errors, first_changed, locked, write_atomically
from ultrazoo.data.progress import Progress
from ultrazoo.data.reading import RowReader
from ultrazoo.data.sources import ParquetSource, Span
from ultrazoo.data.tokenizer import Vocabulary

FORMAT = 2
SHARD_TOKENS = 64 << 20


def default_cache_dir() -> Path:
    """Return the folder for caches where none is set, after the XDG convention."""
    return cache_home() / "data"


def cache_folder(cache_dir: Path, fingerprint: str, vocabulary: Vocabulary) -> Path:
    """Return the folder named by a hash of all that the tokens depend on."""
    facts = json.dumps([FORMAT, fingerprint, vocabulary.sha256])
    return cache_dir / hashlib.sha256(facts.encode()).hexdigest()[:24]


def defect_of(folder: Path) -> str | None:
    """Return why a cache cannot be used, None where it can; every byte of its files is read and summed."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        return first_changed(folder, manifest["files"])
    except OSError:
        return "not complete"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "manifest.json is damaged"


def _job_of(folder: Path) -> str | None:
    """Return the job that a cache was made for; None where it is not known."""
    try:
        return json.loads((folder / "manifest.json").read_bytes())["job"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def build_cache(
    folder: Path,
    source: ParquetSource,
    vocabulary: Vocabulary,
    *,
    rows_at_once: int,
    threads: int,
    rebuild: bool,
    console: Callable[[str], None],
    job: str = "",
) -> None:
    """Tokenise a source into ``folder``, unless it is there already; go on where a run that was cut short stopped.

    Everything is written to a folder aside, which is renamed when it is complete.

    Args:
        folder: Where the cache goes.
        source: What to tokenise.
        vocabulary: With which tokenizer.
        rows_at_once: Rows that are read and tokenised in one go.
        threads: Threads that tokenise.
        rebuild: Make a new one though there is one, unless that was made for this very job.
        console: Takes lines of progress.
        job: Names the processes that train together, of which the first makes the cache for all; empty: this one.

    Raises:
        DataError: The data cannot be read, or the cache not written.
    """
    with locked(folder.with_suffix(".lock"), console):
        asked = rebuild and not (job and _job_of(folder) == job)
        defect = None if asked else defect_of(folder)
        if not asked and defect is None:
            return
        if folder.exists():
            console(f"cache {folder}: rebuilt as asked" if asked else f"warning: cache {folder}: {defect}; rebuilt")
        aside = folder.with_suffix(".partial")
        with cache_errors(folder):
            aside.mkdir(parents=True, exist_ok=True)
            shards = _finished(aside)
            done = shards[-1]["units"][1] if shards else 0
            progress = Progress("tokenising", source.num_rows - int(source.unit_rows[:done].sum()), console)
            if shards:
                console(f"tokenising: going on after {done} of {len(source.units)} row groups")
            writer = _ShardWriter(aside, source, Encoder(vocabulary, threads), rows_at_once, vocabulary.size, progress)
            while done < len(source.units):
                shards.append(writer.write(len(shards), done))
                done = shards[-1]["units"][1]
            manifest = _publish(aside, folder, shards, writer, job)
        skipped = sum(manifest["skipped"].values())
        console(
            f"tokenised {source.num_rows - skipped:,} rows ({manifest['bytes'] / 1e6:.1f} MB) into "
            f"{manifest['tokens']:,} tokens at {progress.rate()}; kept at {folder}"
        )


def _finished(aside: Path) -> list[dict[str, Any]]:
    """Return the records of the shards that an earlier, interrupted run completed."""
    records: list[dict[str, Any]] = []
    while True:
        try:
            record = json.loads((aside / f"shard-{len(records):05d}.json").read_bytes())
            if first_changed(aside, record["files"]) is not None:
                return records
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return records
        records.append(record)


class _ShardWriter:
    """Writes runs of whole row groups as one shard each; memory holds one window of rows."""

    def __init__(
        self,
        folder: Path,
        source: ParquetSource,
        encoder: Encoder,
        rows_at_once: int,
        vocabulary: int,
        progress: Progress,
    ) -> None:
        self.folder, self.source, self.encoder = folder, source, encoder
        self.rows_at_once, self.vocabulary, self.progress = rows_at_once, vocabulary, progress
        self.reader = RowReader(source, keeping=True)

    def write(self, number: int, first: int) -> dict[str, Any]:
        """Write the shard that begins with row group ``first``; its record is written last and makes it count."""
        stem = f"shard-{number:05d}"
        names = {part: f"{stem}.{part}" for part in ("tokens", "offsets", "counts")}
        try:
            record = self._write(names, first)
        except OSError:
            for name in names.values():
                (self.folder / name).unlink(missing_ok=True)
            raise
        write_atomically(self.folder / f"{stem}.json", json.dumps(record).encode())
        return record

    def _write(self, names: dict[str, str], first: int) -> dict[str, Any]:
        counts = np.zeros(self.vocabulary, np.int64)
        skipped: Counter[str] = Counter()
        damage: dict[str, str] = {}
        total = size = 0
        unit = first
        written = {name: SummedFile(self.folder / name) for name in names.values()}
        with written[names["tokens"]] as file, written[names["offsets"]] as edges, written[names["counts"]] as tallies:
            edges.write(np.zeros(1, np.int64).tobytes())
            while unit < len(self.source.units) and total < SHARD_TOKENS:
                for span in self._spans(unit):
                    texts = self.reader.read(span, None, skipped, damage)
                    usable = [text for text in texts if text is not None]
                    ids, sizes = self.encoder.encode(usable)
                    file.write(ids.tobytes())
                    counts += np.bincount(ids, minlength=self.vocabulary)
                    row_lengths = np.zeros(len(texts), np.int64)
                    row_lengths[[text is not None for text in texts]] = sizes
                    edges.write((total + np.cumsum(row_lengths)).tobytes())
                    added = sum(len(text.encode()) for text in usable)
                    total, size = total + len(ids), size + added
                    self.progress.add(len(texts), added)
                unit += 1
            tallies.write(counts.tobytes())
        facts = {"num_tokens": total, "bytes": size, "skipped": dict(skipped), "damage": damage}
        files = {name: file.sums for name, file in written.items()}
        return {**names, "units": [first, unit], **facts, "files": files}

    def _spans(self, unit: int) -> Iterator[Span]:
        rows = self.source.units[unit].rows
        for start in range(0, rows, self.rows_at_once):
            yield Span(unit, start, min(start + self.rows_at_once, rows))

    @property
    def dtype(self) -> str:
        return self.encoder.dtype.name


def _publish(aside: Path, folder: Path, shards: list[dict[str, Any]], writer: _ShardWriter, job: str) -> dict[str, Any]:
    """Write the manifest and put the folder in place of an older one."""
    counts = np.zeros(writer.vocabulary, np.int64)
    skipped: Counter[str] = Counter()
    damage: dict[str, str] = {}
    for shard in shards:
        counts += np.fromfile(aside / shard["counts"], np.int64)
        skipped.update(shard["skipped"])
        damage |= shard.get("damage", {})
    content = counts.tobytes()
    write_atomically(aside / "counts", content)
    manifest = {
        "format": FORMAT,
        "job": job,
        "dtype": writer.dtype,
        "rows": writer.source.num_rows,
        "tokens": sum(shard["num_tokens"] for shard in shards),
        "bytes": sum(shard["bytes"] for shard in shards),
        "skipped": dict(sorted(skipped.items())),
        "damage": damage,
        "shards": shards,
        "files": {name: sums for shard in shards for name, sums in shard["files"].items()}
        | {"counts": [len(content), zlib.crc32(content)]},
    }
    write_atomically(aside / "manifest.json", json.dumps(manifest).encode())
    if folder.exists():
        old = folder.with_suffix(".old")
        if old.exists():
            shutil.rmtree(old)
        folder.replace(old)
        aside.replace(folder)
        shutil.rmtree(old)
    else:
        aside.replace(folder)
    return manifest
