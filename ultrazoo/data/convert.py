"""Plain text and JSON lines -> one Parquet file, line by line, published only when it is whole."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ultrazoo.arguments import file_path, list_of
from ultrazoo.data.finding import EMPTY, NAMED, files_below, once, summary
from ultrazoo.data.progress import Progress
from ultrazoo.data.reading import clean, reasons
from ultrazoo.errors import ArgumentTypeError, DataError, did_you_mean

TEXT_SUFFIXES, JSON_SUFFIXES = (".txt", ".text"), (".jsonl", ".ndjson")
BOM, OTHER_BOMS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
"""Bytes that text in UTF-8, and in UTF-16 or UTF-32, may begin with."""
GROUP_ROWS, GROUP_BYTES = 2000, 4 << 20
SCHEMA = pa.schema([("text", pa.large_string()), ("source", pa.string())])


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote: rows, bytes of text, files read, and lines or documents skipped by reason.

    ``notes`` are lines for the user: entries of folders that were not read, and text files that became one document.
    """

    rows: int
    bytes: int
    files: int
    skipped: dict[str, int]
    notes: tuple[str, ...] = ()


def convert_to_parquet(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    text_key: str = "text",
    overwrite: bool = False,
    console: Callable[[str], None] | None = None,
) -> Converted:
    """Write the documents of text files to a Parquet file with columns ``text`` and ``source``.

    A .txt file holds documents with blank lines between them; a .jsonl file holds one JSON object per line. Both are
    UTF-8, with or without a byte order mark. Each file is read once, however many names of it are given or found; names
    in a folder that begin with . or _ are skipped. Row groups are at most 2,000 rows or about 4 MB, so that shuffling
    has something to shuffle; pages carry checksums.

    Args:
        inputs: Files, or folders that are searched for them recursively in order of name.
        output: The file to write.
        text_key: Where a JSON object holds its text.
        overwrite: Replace a file that is there.
        console: Takes lines of progress.

    Raises:
        DataError: No input, an input of another kind, no usable document, or an output that cannot be written.
        ArgumentError: ``inputs`` is one path and no list, something is no path, or ``text_key`` is no str.
    """
    items = list_of("inputs", inputs, "paths")
    paths = [file_path(f"inputs[{place}]", item).expanduser() for place, item in enumerate(items)]
    if not isinstance(text_key, str):
        raise ArgumentTypeError(f"text_key: got {text_key!r}, expected the name of a key")
    target = file_path("output", output).expanduser()
    if target.exists() and not overwrite:
        raise DataError(f"{target}: exists already; expected a new file; name another one, or ask to overwrite it")
    ignored: dict[Path, str] = {}
    files = _find(paths, ignored)
    total = sum(file.stat().st_size for file in files)
    progress = Progress("converting", total, console or (lambda line: None))
    skipped: Counter[str] = Counter()
    keys: Counter[str] = Counter()
    documents: Counter[Path] = Counter()
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with pq.ParquetWriter(
                aside, SCHEMA, compression="zstd", use_dictionary=["source"], write_page_checksum=True
            ) as writer:
                rows: list[tuple[str, str]] = []
                size = 0
                for file in files:
                    for text, consumed in _documents(file, text_key, skipped, keys):
                        length = 0 if text is None else len(text.encode())
                        progress.add(text is not None, length, consumed)
                        if text is None:
                            continue
                        documents[file] += 1
                        rows.append((text, file.name))
                        size += length
                        if len(rows) >= GROUP_ROWS or size >= GROUP_BYTES:
                            _write(writer, rows)
                            rows, size = [], 0
                _write(writer, rows)
            if not progress.rows:
                raise DataError(_nothing(files, text_key, skipped, keys))
            with aside.open("rb+") as written:
                os.fsync(written.fileno())
            aside.replace(target)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"{error.filename or target}: {error.strerror or error}; expected readable inputs, and a writable "
            "folder with room for the output"
        ) from error
    notes = []
    if ignored:
        notes.append(f"skipped {summary(ignored, paths[0] if len(paths) == 1 else Path())}")
    if single := [file for file in files if documents[file] == 1 and file.suffix.lower() in TEXT_SUFFIXES]:
        names = ", ".join(str(file) for file in single[:NAMED]) + (", ..." if len(single) > NAMED else "")
        notes.append(
            f"{len(single):,} text file(s) without a blank line became one document each ({names}); put blank lines "
            "between documents, or write each as a line of JSON (.jsonl)"
        )
    return Converted(progress.rows, progress.bytes, len(files), dict(sorted(skipped.items())), tuple(notes))


def _find(inputs: Sequence[Path], ignored: dict[Path, str]) -> list[Path]:
    """The files of inputs, each once; ``ignored`` takes what is not read, and empty files."""
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            files += files_below(path, TEXT_SUFFIXES + JSON_SUFFIXES, ignored)
        elif not path.is_file():
            raise DataError(f"{path}: no such file; expected .txt or .jsonl files, or folders that hold some")
        elif path.suffix.lower() in TEXT_SUFFIXES + JSON_SUFFIXES:
            files.append(path)
        else:
            raise DataError(
                f"{path}: got {path.suffix or 'no suffix'}, expected one of "
                f"{', '.join(TEXT_SUFFIXES + JSON_SUFFIXES)}; rename it if it is one of these"
            )
    if not files:
        skipped = f" (skipped: {summary(ignored, Path())})" if ignored else ""
        raise DataError(f"{', '.join(map(str, inputs)) or 'inputs'}: no .txt or .jsonl file there{skipped}")
    files = once(files, ignored)
    ignored |= {file: EMPTY for file in files if file.stat().st_size == 0}
    return files


def _documents(
    file: Path, text_key: str, skipped: Counter[str], keys: Counter[str]
) -> Iterator[tuple[str | None, int]]:
    """Yield each document, or None for one that is unusable, with the bytes of the file it took."""
    with file.open("rb") as content:
        lines = iter(content)
        first = next(lines, b"")
        if first.startswith(OTHER_BOMS):
            skipped["file in UTF-16 or UTF-32; save it as UTF-8"] += 1
            yield None, file.stat().st_size
            return
        lines = chain([first.removeprefix(BOM)], lines)
        if file.suffix.lower() in JSON_SUFFIXES:
            for line in lines:
                yield _json_text(line, text_key, skipped, keys), len(line)
            return
        held: list[bytes] = []
        consumed = 0
        for line in lines:
            consumed += len(line)
            if line.strip():
                held.append(line)
            elif held:
                yield clean(_joined(held), skipped), consumed
                held, consumed = [], 0
        if held:
            yield clean(_joined(held), skipped), consumed


def _joined(lines: list[bytes]) -> bytes:
    return b"".join(lines).replace(b"\r\n", b"\n").rstrip(b"\n")


def _json_text(line: bytes, text_key: str, skipped: Counter[str], keys: Counter[str]) -> str | None:
    if not line.strip():
        return None
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        skipped["invalid UTF-8"] += 1
        return None
    except (ValueError, RecursionError):
        skipped["not JSON"] += 1
        return None
    if not isinstance(record, dict):
        skipped["not a JSON object"] += 1
        return None
    keys.update(record.keys())
    if text_key not in record:
        skipped[f"no key {text_key!r}"] += 1
        return None
    value = record[text_key]
    if value is not None and not isinstance(value, str):
        skipped["not text"] += 1
        return None
    # a lone surrogate escape, such as "\ud800", is a Python string that no encoding can hold
    return clean(value if value is None else value.encode(errors="surrogatepass"), skipped)


def _write(writer: pq.ParquetWriter, rows: list[tuple[str, str]]) -> None:
    if rows:
        texts, sources = zip(*rows, strict=True)
        writer.write_table(pa.table([pa.array(texts, SCHEMA[0].type), pa.array(sources)], schema=SCHEMA))


def _nothing(files: list[Path], text_key: str, skipped: Counter[str], keys: Counter[str]) -> str:
    found = f"; {did_you_mean(text_key, keys)}keys there are: {', '.join(sorted(keys))}" if keys else ""
    why = reasons(skipped) or "the files are empty"
    return f"{files[0]}{' ...' if len(files) > 1 else ''}: no usable document ({why}){found}"
