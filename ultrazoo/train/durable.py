"""Files and folders that are whole or not there: written under a temporary name, flushed, renamed; SHA-256 sums."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError

from ultrazoo.errors import CheckpointError
from ultrazoo.train.formats import Manifest

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
LEFTOVER = re.compile(r"\.(step-\d+(-\d+)?|latest|best|(config|env|tokenizer|metrics)(\.\w+)+)\.(tmp-\d+|deleting)")
CHUNK = 1 << 20
LONGEST_JSON = 4 << 20
"""Bytes of a JSON file; those of a run have some ten thousand."""
PROBLEMS_SHOWN = 3


class FormatVersionError(CheckpointError):
    """A checkpoint of another version of the format: whole for all that can be told, so never to be set aside."""


def publish(folder: Path, files: Mapping[str, Callable[[Path], Any]]) -> None:
    """Write files and their manifest into a new folder that is whole or not there.

    Args:
        folder: The final name, which must not exist; its parent must.
        files: Name -> function that writes the file at the path it is given.

    Raises:
        CheckpointError: The file system refused, for example because it is full; nothing is left behind.
    """
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    try:
        remove(temporary)
        temporary.mkdir()
        for name, write in files.items():
            write(temporary / name)
        entries = {
            name: {"bytes": (temporary / name).stat().st_size, "sha256": sha256(temporary / name)} for name in files
        }
        (temporary / MANIFEST).write_text(
            to_json({"format_version": FORMAT_VERSION, "files": entries}), encoding="utf-8"
        )
        for name in (*files, MANIFEST):
            flush(temporary / name)
        flush(temporary)
        temporary.rename(folder)
        flush(folder.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, (OSError, SafetensorError)):
            raise
        raise CheckpointError(
            f"{folder}: cannot be written: {error}; the earlier checkpoints are intact; free some space, "
            "then continue with --resume auto"
        ) from error


def verify_folder(folder: Path, names: Collection[str], *, alone: bool = False) -> None:
    """Compare every file of a published folder with its manifest.

    Args:
        folder: What ``publish`` wrote.
        names: Files that it must hold.
        alone: Look at no others.

    Raises:
        FormatVersionError: The format is of another version.
        CheckpointError: A file is missing, cut short or changed.
    """
    manifest = read_json(folder / MANIFEST, Manifest)
    version, files = manifest.get("format_version"), manifest.get("files")
    if version != FORMAT_VERSION:
        raise FormatVersionError(
            f"{folder / MANIFEST}: got format_version {version!r}, expected {FORMAT_VERSION}; "
            "read it with the ultrazoo that wrote it"
        )
    if not isinstance(files, dict) or set(names) - set(files) or any(Path(name).name != name for name in files):
        raise CheckpointError(
            f"{folder / MANIFEST}: expected an entry for each of {', '.join(names)}, and names of files beside it"
        )
    problems = []
    for name, entry in files.items():
        path = folder / name
        if alone and name not in names:
            continue
        if not isinstance(entry, dict) or not entry.keys() >= {"bytes", "sha256"}:
            problems.append(f"{MANIFEST} does not describe {name}")
        elif not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != entry["bytes"]:
            problems.append(f"{name} has {path.stat().st_size} bytes, expected {entry['bytes']}")
        elif sha256(path) != entry["sha256"]:
            problems.append(f"{name} does not have the SHA-256 of its manifest")
    if problems:
        raise CheckpointError(f"{folder}: damaged: {'; '.join(problems)}; use another checkpoint")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace a small text file in one piece."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a small file in one piece."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    remove(temporary)
    with temporary.open("xb") as file:  # x: a link that someone put there is not followed
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    flush(path.parent)


def move_aside(path: Path) -> Path:
    """Rename what lies at ``metrics.jsonl`` to the first free name like ``metrics.1.jsonl``, and return that."""
    return path.rename(place_aside(path))


def place_aside(path: Path) -> Path:
    """Return the first free name like ``metrics.1.jsonl`` for what lies at ``metrics.jsonl``."""
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.stem}.{number}{path.suffix}")):
        number += 1
    return aside


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there; what a link leads to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left half written or half removed; the folder must be this process's own."""
    for path in list(folder.iterdir()):
        if LEFTOVER.fullmatch(path.name):
            remove(path)


def odd_kind(path: Path, *, folder: bool = False) -> str | None:
    """Return what lies at a path if it is not a regular file (or a folder); None if it is one, or nothing is there.

    A link is never what a run itself wrote, whatever it leads to.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(mode):
        return f"a symbolic link to {path.readlink()}"
    kinds = {stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    kind = stat.S_IFMT(mode)
    return None if kind == (stat.S_IFDIR if folder else stat.S_IFREG) else kinds.get(kind, "a device")


def open_own(path: Path, flags: int) -> int:
    """Open a file of the run folder and return its descriptor; a link is not followed, a named pipe not waited for."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)


def require_file(path: Path) -> None:
    """Refuse what is no regular file and no link to one, such as a named pipe, which reading would wait for.

    Raises:
        OSError: It is something else.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, f"is {odd_kind(path)}, expected a file", str(path))


def to_json(data: Any) -> str:
    """One line of JSON, without NaN."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")) + "\n"


def read_json(path: Path, form: Any, cure: str = "use another checkpoint") -> dict[str, Any]:
    """Read one JSON object.

    Args:
        path: The file, of at most ``LONGEST_JSON`` bytes.
        form: What it must hold, a record of ``ultrazoo.train.formats``.
        cure: What to do about a damaged file, for the error message.

    Raises:
        CheckpointError: The file is missing, too large, damaged or of another form.
    """
    try:
        require_file(path)
        with path.open("rb") as file:
            text = file.read(LONGEST_JSON + 1)
        if len(text) > LONGEST_JSON:
            raise CheckpointError(
                f"{path}: got {path.stat().st_size:,} bytes, expected at most {LONGEST_JSON:,}; {cure}"
            )
        _adapter(form).validate_json(text, strict=True)
        data: dict[str, Any] = json.loads(text)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}; {cure}") from error
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)
        problems = [f"{'.'.join(map(str, item['loc'])) or 'file'}: {item['msg']}" for item in found[:PROBLEMS_SHOWN]]
        more = f"; {len(found) - PROBLEMS_SHOWN} more" if len(found) > PROBLEMS_SHOWN else ""
        raise CheckpointError(f"{path}: damaged: {'; '.join(problems)}{more}; {cure}") from error
    return data


@functools.cache
def _adapter(form: Any) -> TypeAdapter[Any]:
    return TypeAdapter(form)
