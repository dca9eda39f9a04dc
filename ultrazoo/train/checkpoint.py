"""One checkpoint on disk: a folder of safetensors, JSON and YAML under a manifest of SHA-256 sums.

    step-000500/
      model.safetensors       weights, each shared tensor once
      optimizer.safetensors   <parameter>/<name> -> tensor of the optimiser's state
      state.json              step, data position, random numbers, scaler, metrics, versions
      config.yaml             the resolved config
      tokenizer.json          the tokenizer
      receipt.json            what it was made with: versions, machine, kernels, plugins, data
      manifest.json           format_version, and the size and SHA-256 of each file above

A folder is written under a temporary name, flushed to the disk and renamed: it is whole or it is not there. Nothing in
it is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ultrazoo.config.yaml import parse_yaml
from ultrazoo.errors import CheckpointError, ConfigError

FORMAT_VERSION = 1
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
CONFIG, TOKENIZER, MANIFEST, RECEIPT = "config.yaml", "tokenizer.json", "manifest.json", "receipt.json"
LEFTOVER = re.compile(r"\.(step-\d+(-\d+)?|latest|best|(config|env|tokenizer|metrics)\.\w+)\.(tmp-\d+|deleting)")
CHUNK = 1 << 20
FILES = (MODEL, OPTIMIZER, STATE, CONFIG, TOKENIZER)


class FormatVersionError(CheckpointError):
    """A checkpoint of another version of the format: whole for all that can be told, so never to be set aside."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a checkpoint holds; ``state`` and ``receipt`` are JSON values."""

    model: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    state: dict[str, Any]
    config_yaml: str
    tokenizer_json: str
    receipt: dict[str, Any] = field(default_factory=dict)


def write_checkpoint(folder: Path, snapshot: Snapshot) -> None:
    """Write a whole checkpoint, or nothing.

    Args:
        folder: The final name, which must not exist; its parent must.
        snapshot: What to write.

    Raises:
        CheckpointError: The file system refused, for example because it is full; nothing is left behind.
    """
    publish(
        folder,
        {
            MODEL: lambda path: save_file(on_host(snapshot.model), path, metadata={"format": "pt"}),
            OPTIMIZER: lambda path: save_file(on_host(snapshot.optimizer), path),
            STATE: lambda path: path.write_text(to_json(snapshot.state), encoding="utf-8"),
            CONFIG: lambda path: path.write_text(snapshot.config_yaml, encoding="utf-8"),
            TOKENIZER: lambda path: path.write_text(snapshot.tokenizer_json, encoding="utf-8"),
            RECEIPT: lambda path: path.write_text(json.dumps(snapshot.receipt, indent=2) + "\n", encoding="utf-8"),
        },
    )


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
        shutil.rmtree(temporary, ignore_errors=True)
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
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"{folder}: cannot be written: {error}; the earlier checkpoints are intact; free some space, "
            "then continue with --resume auto"
        ) from error


def verify_checkpoint(folder: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        CheckpointError: A file is missing, cut short or changed, or the format is of another version.
    """
    verify_folder(folder, FILES)


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
    manifest = read_json(folder / MANIFEST)
    version, files = manifest.get("format_version"), manifest.get("files")
    if version != FORMAT_VERSION:
        raise FormatVersionError(
            f"{folder / MANIFEST}: got format_version {version!r}, expected {FORMAT_VERSION}; "
            "read it with the ultrazoo that wrote it"
        )
    if not isinstance(files, dict) or set(names) - set(files):
        raise CheckpointError(f"{folder / MANIFEST}: expected an entry for each of {', '.join(names)}")
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


def read_state(folder: Path) -> dict[str, Any]:
    """Return state.json of a checkpoint."""
    return read_json(folder / STATE)


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.yaml of a checkpoint as plain data.

    Raises:
        CheckpointError: The file is missing or is not a config.
    """
    path = folder / CONFIG
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}; use another checkpoint") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: got {type(data).__name__}, expected a config; use another checkpoint")
    return data


def model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state dict with every shared tensor once, under its first name."""
    tensors: dict[str, torch.Tensor] = {}
    seen: set[tuple[int, torch.Size, tuple[int, ...]]] = set()
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() == 0 or place not in seen:
            tensors[name] = tensor
        seen.add(place)
    return tensors


def load_model(folder: Path, model: nn.Module) -> None:
    """Copy the weights of a checkpoint into a model of the same shape.

    Raises:
        CheckpointError: Lists every tensor that is missing, not known, or of another shape or dtype.
    """
    copy_tensors(folder, model_tensors(model), lambda tensor, value: tensor.copy_(value))


def copy_tensors(
    folder: Path, own: Mapping[str, torch.Tensor], put: Callable[[torch.Tensor, torch.Tensor], Any]
) -> None:
    """Compare the weights of a checkpoint with those of a model, then hand each pair to ``put``.

    Raises:
        CheckpointError: Lists every tensor that is missing, not known, or of another shape or dtype.
    """
    path = folder / MODEL
    saved = read_tensors(path)
    problems = [f"{name}: in the model, not in the file" for name in own.keys() - saved.keys()]
    problems += [f"{name}: in the file, not in the model" for name in saved.keys() - own.keys()]
    for name in own.keys() & saved.keys():
        expected, got = own[name], saved[name]
        if (expected.shape, expected.dtype) != (got.shape, got.dtype):
            problems.append(f"{name}: got {_describe(got)}, expected {_describe(expected)}")
    if problems:
        lines = "\n".join(f"  {line}" for line in sorted(problems))
        raise CheckpointError(f"{path}: does not fit the model:\n{lines}\n  use the config.yaml beside it")
    with torch.no_grad():
        for name, tensor in own.items():
            put(tensor, saved[name])


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[torch.Tensor, str]) -> dict[str, torch.Tensor]:
    """Flatten the optimiser's state to ``<parameter>/<name>`` -> tensor."""
    return {
        f"{names[parameter]}/{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer(
    folder: Path,
    optimizer: torch.optim.Optimizer,
    names: Mapping[torch.Tensor, str],
    part: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, value: value,
) -> None:
    """Restore the optimiser's state from a checkpoint; hyperparameters stay those of the run.

    Args:
        folder: The checkpoint.
        optimizer: The optimiser.
        names: Parameter -> name.
        part: Takes a parameter's name and a whole tensor of its state, and returns what this process keeps of it.

    Raises:
        CheckpointError: The file holds the state of parameters that the optimiser does not have.
    """
    path = folder / OPTIMIZER
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in read_tensors(path).items():
        name, _, entry = key.rpartition("/")
        if name not in order:
            raise CheckpointError(f"{path}: holds state of {name!r}, which is no parameter of this run's optimiser")
        state.setdefault(order.index(name), {})[entry] = part(name, tensor)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file to the CPU.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}; use another checkpoint") from error


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
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    flush(temporary)
    temporary.replace(path)
    flush(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left half written or half removed; the folder must be this process's own."""
    for path in list(folder.iterdir()):
        if LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def on_host(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of tensors that safetensors can write: on the CPU, contiguous, each in a storage of its own size."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # a view into a larger storage would drag the rest of it along
    return {name: t.clone() if t.untyped_storage().nbytes() != t.nbytes else t for name, t in ready.items()}


def _describe(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def to_json(data: Any) -> str:
    """One line of JSON, without NaN."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object.

    Raises:
        CheckpointError: The file is missing, or is no such thing.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}; use another checkpoint") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: got {type(data).__name__}, expected an object; use another checkpoint")
    return data
