"""The training section of a config -> the data of the run, with every check that can be made before the first step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ultrazoo.data.cache import build_cache, cache_folder, default_cache_dir, defect_of
from ultrazoo.data.module import DataModule
from ultrazoo.data.reading import reasons
from ultrazoo.data.sources import ParquetSource, open_source
from ultrazoo.data.split import Split
from ultrazoo.data.stores import Store, TextStore, TokenStore
from ultrazoo.data.tokenizer import Vocabulary, find_vocabulary
from ultrazoo.errors import DataError
from ultrazoo.revisions import Revisions

if TYPE_CHECKING:
    from ultrazoo.config import TrainingConfig


def build_data(
    training: TrainingConfig,
    model_vocab_size: int,
    console: Callable[[str], None],
    job: str = "",
    revisions: Revisions | None = None,
) -> DataModule:
    """Find the data, its tokenizer and its tokens, or make the latter two.

    Args:
        training: The config's training section.
        model_vocab_size: Entries of the model's embedding.
        console: Takes lines about what is done, how far it is and what was skipped.
        job: A name that all processes of a run share: a cache that ``prefer_local_cache: false`` makes anew is made by
            the first of them on each file system, and used by the others.
        revisions: Rules of the run; None: those of a new one.

    Raises:
        DataError: Data that is missing, damaged or without a usable row, or a cache that cannot be written.
        ConfigError: A tokenizer that does not fit the model or the settings.
    """
    cache_dir = Path(training.cache_dir).expanduser() if training.cache_dir else default_cache_dir()
    source = open_source(training.local_parquet_dir, training.text_column, training.max_samples, training.on_bad_data)
    for damaged in source.damaged:
        console(f"warning: data: {damaged.reason}; skipped (training.on_bad_data)")
    vocabulary = find_vocabulary(
        source,
        given=training.tokenizer,
        vocab_size=model_vocab_size,
        cache_dir=cache_dir,
        threads=training.num_workers,
        console=console,
    )
    store = _store(training, source, vocabulary, cache_dir, console, job)
    data = DataModule(source, vocabulary, store, training, console, revisions)
    stats = data.stats
    seen = f", {stats['tokens']:,} tokens" if isinstance(store, TokenStore) else ", tokenised while training"
    console(f"data: {stats['rows']:,} rows in {stats['files']} file(s){seen}")
    if isinstance(store, TokenStore):
        for damage in stats["damage"].values():
            console(f"warning: data: {damage}; its rows from there on are skipped (training.on_bad_data)")
    if data.left_out:
        console(f"data: skipped {data.left_out}")
    return data


def _store(
    training: TrainingConfig,
    source: ParquetSource,
    vocabulary: Vocabulary,
    cache_dir: Path,
    console: Callable[[str], None],
    job: str,
) -> Store:
    split = Split(source, training.validation_fraction)
    folder = cache_folder(cache_dir, source, vocabulary)
    if training.stream_local_parquet:
        wanted = training.prefer_local_cache and folder.exists()
        defect = defect_of(folder) if wanted else None
        if defect is not None:
            console(f"warning: cache {folder}: {defect}; not used")
        if not wanted or defect is not None:
            threads = max(1, training.num_workers // max(1, training.dataloader_workers))
            return TextStore(source, vocabulary, split, threads)
    else:
        build_cache(
            folder,
            source,
            vocabulary,
            rows_at_once=training.dataset_batch_size,
            threads=training.num_workers,
            rebuild=not training.prefer_local_cache,
            console=console,
            job=job,
        )
    store = TokenStore(folder, source, vocabulary, split)
    if training.on_bad_data == "error" and store.manifest["skipped"]:
        found = [*store.manifest.get("damage", {}).values(), reasons(store.manifest["skipped"])]
        raise DataError(
            f"training.on_bad_data: is error, but rows of this data cannot be used: {'; '.join(found)}; run once with "
            "training.prefer_local_cache=false to learn where, or set training.on_bad_data to skip"
        )
    return store
