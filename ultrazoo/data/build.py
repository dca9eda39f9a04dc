"""The training section of a config -> the data of the run, with every check that can be made before the first step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrazoo.data.cache import build_cache, cache_folder, default_cache_dir, defect_of
from ultrazoo.data.digests import HASHING, Digests
from ultrazoo.data.finding import DISCOVERY, summary
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
    resumed: Mapping[str, Any] | None = None,
) -> DataModule:
    """Find the data, its tokenizer and its tokens, or make the latter two.

    Args:
        training: The config's training section.
        model_vocab_size: Entries of the model's embedding.
        console: Takes lines about what is done, how far it is and what was skipped.
        job: A name that all processes of a run share: a cache that ``prefer_local_cache: false`` makes anew is made by
            the first of them on each file system, and used by the others.
        revisions: Rules of the run; None: those of a new one.
        resumed: The data's state in the checkpoint that the run continues from: the rules of which files are read are
            those that the run began with.

    Raises:
        DataError: Data that is missing, damaged or without a usable row, or a cache that cannot be written.
        ConfigError: A tokenizer that does not fit the model or the settings.
    """
    cache_dir = Path(training.cache_dir).expanduser() if training.cache_dir else default_cache_dir()
    source = open_source(
        training.local_parquet_dir,
        training.text_column,
        training.max_samples,
        training.on_bad_data,
        digests=Digests(cache_dir / "digests"),
        discovery=_discovery_of(resumed),
        console=console,
    )
    _say_what_was_found(source, console)
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


def _discovery_of(resumed: Mapping[str, Any] | None) -> int:
    """The revision of the rules of which files are read; a saved state without one is of the first."""
    if resumed is None:
        return DISCOVERY
    for name, latest in (("discovery", DISCOVERY), ("hashing", HASHING)):
        if (saved := resumed.get(name, 1)) > latest:
            raise DataError(
                f"data state: got {name} {saved}, expected at most {latest}; it is of a later version of ultrazoo; "
                "resume with that version"
            )
    return resumed.get("discovery", 1)


def _say_what_was_found(source: ParquetSource, console: Callable[[str], None]) -> None:
    found = source.found
    if found.skipped:
        console(f"data: skipped {summary(found.skipped, found.root)}; ULTRAZOO_LOG=debug lists every entry")
    if found.discovery < DISCOVERY:
        console(
            "warning: data: this run began under an earlier rule of which files are read, and keeps it: "
            f"{len(found.files):,} file(s), also those whose names begin with . or _, files under each of their names, "
            "and of folders only *.parquet; a new run reads by the present rule"
        )
    if source.digests.problem:
        console(f"warning: data: the hashes of large files are not kept: {source.digests.problem}")


def _store(
    training: TrainingConfig,
    source: ParquetSource,
    vocabulary: Vocabulary,
    cache_dir: Path,
    console: Callable[[str], None],
    job: str,
) -> Store:
    split = Split(source, training.validation_fraction)
    folder = cache_folder(cache_dir, source.fingerprint, vocabulary)
    sampled = cache_folder(cache_dir, source.fingerprint_by(1), vocabulary)
    if sampled != folder and sampled.exists() and not folder.exists():
        console(
            f"cache {sampled}: made by an earlier version, which compared files over 64 MiB by samples only; not used, "
            "as their text may have changed since; delete it to free its space"
        )
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
