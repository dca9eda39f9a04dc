"""Times the way from Parquet to batches, with the tokenizer alone and a bare copy of the cache as yardsticks.

    python bench/input_pipeline.py --data texts/ --threads 1 --rounds 11

Tokenising: ``build_cache`` and an epoch of ``stream_local_parquet`` (with packing and masks) against the tokenizers
library over the same texts, already in memory, with the same vocabulary and threads; each turn makes its tokenizer
anew. Cache: an epoch from a cache that is there, part by part. The ways take turns, and freed memory is kept as in
training. Seconds are CPU time of the process with one thread, else wall-clock time; figures are medians over the
rounds, ratios those within each round.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

SLICE = 1024
Way = Callable[[], int]
"""Does the work once; returns how many tokens it came to."""


def rates(ways: dict[str, Way], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Tokens per second of each way in each round, in which all have their turn; one round before is not counted."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    for number in range(rounds + 1):
        for name in order[number % len(order) :] + order[: number % len(order)]:
            start = clock()
            tokens = ways[name]()
            if number:
                found[name].append(tokens / (clock() - start))
    return found


def tokenising(training: Any, vocabulary: Any, source: Any, texts: Sequence[str], scratch: Path) -> dict[str, Way]:
    """The tokenizer alone, and our two ways from Parquet to tokens."""
    from ultrazoo.data.build import build_data
    from ultrazoo.data.cache import build_cache

    parts = [texts[start : start + SLICE] for start in range(0, len(texts), SLICE)]

    def alone(name: str) -> int:
        tokenizer = vocabulary.tokenizer()
        tokenizer.encode_special_tokens = True
        encode = getattr(tokenizer, name)
        return sum(len(item) for part in parts for item in encode(part, add_special_tokens=False))

    built = iter(range(10**6))

    def cache() -> int:
        folder = scratch / f"built-{next(built)}"
        build_cache(
            folder,
            source,
            vocabulary,
            rows_at_once=training.dataset_batch_size,
            threads=training.num_workers,
            rebuild=False,
            console=lambda line: None,
        )
        return int(np.fromfile(folder / "counts", np.int64).sum())

    updates = {"stream_local_parquet": True, "prefer_local_cache": False, "cache_dir": str(scratch)}
    data = build_data(training.model_copy(update=updates), 10**6, lambda line: None)
    last = len(data._dataset.epoch_plan(0)) - 1

    def stream() -> int:
        data._position, data.store._tools = (0, 0, 0), None  # type: ignore[attr-defined]
        data._seen.clear()
        for _ in data.train_batches():
            if data._position[1] == last:  # that window is read; to go on to its end would begin the next epoch
                break
        return int(data._seen["tokens"])

    return {
        "tokenizers encode_batch": partial(alone, "encode_batch"),
        "tokenizers encode_batch_fast": partial(alone, "encode_batch_fast"),
        "cache building": cache,
        "streaming, packed and masked": stream,
    }


def cached(training: Any, vocabulary_size: int) -> dict[str, Way]:
    """An epoch from the cache: a bare copy, and what each further part adds to it."""
    from ultrazoo.data.build import build_data
    from ultrazoo.data.windows import Window

    data = build_data(training, vocabulary_size, lambda line: None)
    dataset, total = data._dataset, int(data.stats["tokens"])
    tokens = [file for file, _ in data.store._shards]  # type: ignore[attr-defined]
    epochs = max(1, 4_000_000 // total)

    def repeated(work: Callable[[], int]) -> Way:
        return lambda: sum(work() for _ in range(epochs))

    def copy() -> int:
        return sum(len(file.read(0, len(file))) for file in tokens)

    def read() -> int:
        return sum(
            int(dataset.read((0, window)).documents.lengths.sum()) for window in range(len(dataset.epoch_plan(0)))
        )

    def packed() -> int:
        prepared = [dataset[0, window] for window in range(len(dataset.epoch_plan(0)))]
        return sum(window.num_tokens for window in prepared if isinstance(window, Window))

    def batches() -> int:
        data._position, count = (0, 0, 0), 0
        for batch in data.train_batches():
            count += batch.num_tokens
            if data.epoch >= 1:
                break
        return count

    ways = {"bare copy of the cache": copy, "windows read": read, "and packed": packed, "and masked": batches}
    return {name: repeated(way) for name, way in ways.items()}


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="Parquet file or folder; unset: the embedded texts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--rows", type=int, default=2048, help="most rows to tokenise")
    parser.add_argument("--vocabulary", type=int, default=8192)
    given = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if given.threads > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(given.threads)
    clock = time.process_time if given.threads == 1 else time.perf_counter

    from ultrazoo.config import TrainingConfig
    from ultrazoo.data.build import build_data
    from ultrazoo.data.reading import RowReader
    from ultrazoo.data.sources import Span, open_source
    from ultrazoo.train.runtime import keep_memory

    keep_memory()
    with tempfile.TemporaryDirectory() as folder:
        options = {"local_parquet_dir": given.data, "max_samples": given.rows, "num_workers": given.threads}
        training = TrainingConfig(**options, cache_dir=folder)
        data = build_data(training, given.vocabulary, lambda line: None)
        vocabulary = data.vocabulary
        tokenizer_file = Path(folder) / "tokenizer.json"
        tokenizer_file.write_text(vocabulary.text, encoding="utf-8")
        training = training.model_copy(update={"tokenizer": str(tokenizer_file)})
        source = open_source(given.data, max_samples=given.rows)
        spans = [Span(unit, 0, rows) for unit, rows in enumerate(source.unit_rows.tolist())]
        reader, skipped = RowReader(source), data._skipped.copy()
        texts = [text for span in spans for text in reader.read(span, None, skipped) if text is not None]
        size = sum(len(text.encode()) for text in texts)
        count = data.stats["tokens"]
        print(f"{len(texts):,} texts, {size / 1e6:.1f} MB, {count:,} tokens, {given.threads} thread(s)")
        found = rates(tokenising(training, vocabulary, source, texts, Path(folder)), given.rounds, clock)
        yardstick = found["tokenizers encode_batch"]
        for name, own in found.items():
            rate = statistics.median(own)
            share = statistics.median(one / other for one, other in zip(own, yardstick, strict=True))
            print(f"  {name:<30} {rate:>14,.0f} tokens/s {rate * size / count / 1e6:6.2f} MB/s {share:6.1%}")
        before = 0.0
        for name, own in rates(cached(training, given.vocabulary), given.rounds, clock).items():
            whole = 1e9 / statistics.median(own)
            print(f"  {name:<30} {1e9 / whole:>14,.0f} tokens/s {whole - before:6.2f} ns a token for this part")
            before = 0.0 if name == "bare copy of the cache" else whole


if __name__ == "__main__":
    main()
