"""What a checkpoint was made with, for whoever finds it later: versions, machine, kernels, plugins, data."""

from __future__ import annotations

import importlib.metadata
from dataclasses import asdict
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import torch

from ultrazoo.config import Config
from ultrazoo.ops.library import get_kernel_policy, kernel_status
from ultrazoo.registry import registry
from ultrazoo.train.runtime import environment
from ultrazoo.train.schedule import Progress

if TYPE_CHECKING:
    from ultrazoo.data import DataModule

PACKAGES = ("numpy", "pyarrow", "pydantic", "safetensors", "tokenizers")


def make_receipt(config: Config, device: torch.device, data: DataModule, progress: Progress) -> dict[str, Any]:
    """Return JSON values that say what made a checkpoint.

    Args:
        config: The whole configuration; it lies beside the receipt as config.yaml.
        device: The device that trains.
        data: The data.
        progress: Where the run stands.
    """
    stats = data.stats
    return {
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "step": progress.step,
        "epoch": data.epoch,
        "tokens": progress.tokens,
        "train_loss": progress.train_loss,
        "validation": progress.validation if progress.validated_step == progress.step else {},
        **environment(device),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "plugins": plugins_used(config),
        "kernel_policy": get_kernel_policy(),
        "kernels": kernels_used(config, device),
        "data": {
            "fingerprint": data.fingerprint,
            **{name: stats[name] for name in ("files", "rows", "skipped", "damage", "damaged_files")},
        },
        "tokenizer_sha256": data.tokenizer_sha256,
    }


def kernels_used(config: Config, device: torch.device) -> list[dict[str, Any]]:
    """Each op that the mixers of the model use, and what it runs on."""
    mixers = registry().mixers()
    names = {op for mixer in config.model.layer_pattern for op in mixers[mixer].ops}
    if config.model.use_bitnet:
        names.add("ultrazoo::bitlinear")
    found = sorted(names & set(registry().ops()))
    if get_kernel_policy() == "reference":  # asking for their status would build the kernels
        return [{"op": name, "device": device.type, "compiled": False, "detail": "by policy"} for name in found]
    return [asdict(kernel_status(name, device.type)) for name in found]


def plugins_used(config: Config) -> dict[str, str]:
    """Distribution -> version of the plugins whose blocks the model is made of."""
    model = config.model
    names = {("mixer", name) for name in model.layer_pattern} | {("norm", model.norm_type)}
    return {
        plugin.distribution: plugin.version
        for plugin in registry().plugins
        if plugin.name == "core" or any((block.kind, block.name) in names for block in plugin.blocks)
    }
