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

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ultrazoo.config.paths import at_home
from ultrazoo.config.yaml import read_yaml
from ultrazoo.errors import CheckpointError, ConfigError
from ultrazoo.train.durable import publish, read_json, require_file, to_json, verify_folder
from ultrazoo.train.formats import State
from ultrazoo.train.galore import state_shapes

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
CONFIG, TOKENIZER, RECEIPT = "config.yaml", "tokenizer.json", "receipt.json"
FILES = (MODEL, OPTIMIZER, STATE, CONFIG, TOKENIZER)
WEIGHTS = (MODEL, CONFIG, TOKENIZER)


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


def verify_checkpoint(folder: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        CheckpointError: A file is missing, cut short or changed, or the format is of another version.
    """
    verify_folder(folder, FILES)


def verify_weights(folder: Path) -> None:
    """Compare the weights, their config and tokenizer with the manifest; the other files may be missing.

    Raises:
        CheckpointError: One of the three is missing, cut short or changed, or the format is of another version.
    """
    verify_folder(folder, WEIGHTS, alone=True)


def read_state(folder: Path) -> dict[str, Any]:
    """Return state.json of a checkpoint.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    return read_json(folder / STATE, State)


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.yaml of a checkpoint or flight record as plain data, with its paths where its run folder is now.

    Raises:
        CheckpointError: The file is missing or is not a config.
    """
    path = folder / CONFIG
    try:
        require_file(path)
        data = read_yaml(path)
    except (OSError, ConfigError) as error:
        raise CheckpointError(f"{error}; use another checkpoint") from error
    sections = data if isinstance(data, dict) else {"config": data}
    for name, section in sections.items():
        if name != "model_class" and not isinstance(section, dict):
            got = type(section).__name__
            raise CheckpointError(f"{path}: {name}: got {got}, expected a section; use another checkpoint")
    return at_home(sections, path)[0]


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
        CheckpointError: The file holds the state of parameters that the optimiser does not have, or state of another
            shape than it keeps.
    """
    path = folder / OPTIMIZER
    owners = [(parameter, group) for group in optimizer.param_groups for parameter in group["params"]]
    order = {names[parameter]: index for index, (parameter, _) in enumerate(owners)}
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in read_tensors(path).items():
        name, _, entry = key.rpartition("/")
        if name not in order:
            raise CheckpointError(f"{path}: holds state of {name!r}, which is no parameter of this run's optimiser")
        state.setdefault(order[name], {})[entry] = part(name, tensor)
    for index, entries in state.items():  # the fused update reads and writes without asking for sizes
        parameter, group = owners[index]
        got = {entry: tuple(tensor.shape) for entry, tensor in entries.items()}
        if got != (expected := state_shapes(parameter, group.get("rank", 0))):
            raise CheckpointError(
                f"{path}: got {_shapes(got)} of {names[parameter]}, expected {_shapes(expected)}; go on with the "
                "checkpoint's use_galore, galore_rank and galore_max_dim, or begin a new run with its weights alone: "
                "--weights-only"
            )
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


def on_host(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of tensors that safetensors can write: on the CPU, contiguous, each in a storage of its own size."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # a view into a larger storage would drag the rest of it along
    return {name: t.clone() if t.untyped_storage().nbytes() != t.nbytes else t for name, t in ready.items()}


def _shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in sorted(shapes.items()))


def _describe(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
