"""Memory of the process over millions of rows: while streaming, while a cache is built, and in an epoch from the cache.

    python bench/input_memory.py --make rows/ --rows 10000000
    python bench/input_memory.py --data rows/

``--make`` writes rows of 5 to 10 words that follow one another in the embedded texts, by a fixed seed, a million to a
file. Each of the three ways has a process of its own, which walks through all rows and notes its resident memory:
anonymous (what it has allocated) and of files (libraries, the mapped cache, which the system takes back when it needs
it).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

WAYS = ("streaming", "cache building", "cache")
POINTS = 34
FILE_ROWS, GROUP_ROWS = 1_000_000, 50_000
SHORTEST, LONGEST = 5, 10


def make(folder: Path, rows: int) -> None:
    """Write Parquet files of short texts."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from ultrazoo.data.finding import CORPUS

    texts = [text for path in sorted(CORPUS.glob("*.parquet")) for text in pq.read_table(path)["text"].to_pylist()]
    words = pa.array([word for text in texts for word in text.split()])
    chance = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number, first in enumerate(range(0, rows, FILE_ROWS)):
        count = min(FILE_ROWS, rows - first)
        lengths = chance.integers(SHORTEST, LONGEST + 1, count)
        starts = chance.integers(0, len(words) - LONGEST, count)
        edges = np.concatenate([[0], np.cumsum(lengths)])
        taken = words.take(pa.array(np.arange(edges[-1]) + np.repeat(starts - edges[:-1], lengths)))
        column = pc.binary_join(pa.ListArray.from_arrays(pa.array(edges.astype(np.int32)), taken), " ")
        table, path = pa.table({"text": column}), folder / f"part-{number:03d}.parquet"
        pq.write_table(table, path, row_group_size=GROUP_ROWS, compression="zstd", write_page_checksum=True)


class Samples:
    """Prints resident memory as the rows go by."""

    def __init__(self, way: str, total: int) -> None:
        self.way, self.total, self.next, self.started = way, total, 0.0, time.process_time()

    def add(self, rows: float) -> None:
        """Note the memory at so many rows, if it is time."""
        if rows < self.next:
            return
        self.next = min(max(self.next, rows) + self.total / POINTS, self.total)
        lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
        kib = {line[0]: int(line[1]) for line in lines if line[0].startswith("Rss")}
        figures = {"anonymous_mib": kib["RssAnon:"] / 1024, "file_mib": kib["RssFile:"] / 1024}
        seconds = round(time.process_time() - self.started, 1)
        figures = {name: round(value, 1) for name, value in figures.items()}
        print(json.dumps({"way": self.way, "rows": round(rows), **figures, "cpu_seconds": seconds}), flush=True)


def walk(way: str, data: str, cache: str) -> None:
    """Go through all rows once, one way."""
    import ultrazoo.data.cache as building
    from ultrazoo.config import TrainingConfig
    from ultrazoo.data.build import build_data
    from ultrazoo.data.finding import CORPUS
    from ultrazoo.data.sources import open_source

    samples = Samples(way, open_source(data).num_rows)

    class Sampled(building.Progress):
        def add(self, rows: int, size: int, done: int | None = None) -> None:
            super().add(rows, size, done)
            samples.add(self.rows)

    if way == "cache building":
        building.Progress = Sampled  # type: ignore[misc]
    training = TrainingConfig(
        local_parquet_dir=data,
        tokenizer=str(CORPUS / "tokenizer.json"),
        cache_dir=cache,
        num_workers=1,
        stream_local_parquet=way == "streaming",
    )
    texts = build_data(training, 8192, lambda line: None)
    if way == "cache building":
        return
    for _ in texts.train_batches():
        samples.add(texts.epoch * samples.total)
        if texts.epoch >= 1:
            return


def draw(rows: list[dict[str, Any]], output: Path) -> None:
    """Memory over rows, a curve for each way."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for way, color in zip(WAYS, ("tab:blue", "tab:orange", "tab:green"), strict=True):
        own = [row for row in rows if row["way"] == way]
        millions = [row["rows"] / 1e6 for row in own]
        axis.plot(millions, [row["anonymous_mib"] for row in own], color=color, linewidth=1.5, label=way)
        whole = [row["anonymous_mib"] + row["file_mib"] for row in own]
        axis.plot(millions, whole, color=color, linewidth=1, linestyle=":", label=f"{way}, with mapped files")
    axis.set_title("resident memory of the process, MiB", loc="left")
    axis.set_xlabel("million rows")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(ncols=3, fontsize=8)
    figure.savefig(output, dpi=120, format="png")


def main() -> None:
    """Make the rows, or walk through them and keep what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make", type=Path, help="write the rows to this folder, and stop")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--data", help="folder of Parquet files")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=WAYS, help="rows of the others stay as they are")
    parser.add_argument("--output", type=Path, default=Path("bench/results/input_memory.jsonl"))
    parser.add_argument("--plot", type=Path, default=Path("docs/images/input_memory.png"))
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    parser.add_argument("--walk", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.make:
        return make(given.make, given.rows)
    if given.walk:
        return walk(given.walk, given.data, given.cache)
    if not given.data:
        parser.error("--data: the folder that --make wrote")
    kept = [json.loads(line) for line in given.output.read_text().splitlines()] if given.output.exists() else []
    rows = [row for row in kept if row["way"] not in given.ways]
    with tempfile.TemporaryDirectory() as cache:
        for way in given.ways:
            command = [sys.executable, __file__, "--walk", way, "--data", given.data, "--cache", cache]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows += [json.loads(line) for line in done.stdout.splitlines()]
    given.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw(rows, given.plot)
    for way in WAYS:
        own = [row["anonymous_mib"] for row in rows if row["way"] == way]
        if own:
            print(f"{way}: {own[0]:.0f} MiB at the first rows, {min(own):.0f} to {max(own):.0f} over all")


if __name__ == "__main__":
    main()
