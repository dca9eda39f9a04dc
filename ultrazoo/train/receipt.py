"""What a checkpoint was made with, for whoever finds it later: versions, machine, kernels, plugins, data."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import torch

import ultrazoo
from ultrazoo.config import Config
from ultrazoo.distributions import version_of
from ultrazoo.ops.library import get_kernel_policy, kernel_status, library_of
from ultrazoo.plugins import CORE
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
        "packages": {name: version_of(name) for name in PACKAGES},
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
    """Each op that the blocks of the model use, and what it runs on."""
    names = {op for kind, name in config.model.blocks_used for op in registry().block(kind, name).ops}
    if config.model.use_bitnet:
        names.add("ultrazoo::bitlinear")
    found = sorted(name for name in names & set(registry().ops()) if library_of(name))  # others have no kernels of ours
    if get_kernel_policy() == "reference":  # asking for their status would build the kernels
        return [{"op": name, "device": device.type, "compiled": False, "detail": "by policy"} for name in found]
    return [asdict(kernel_status(name, device.type)) for name in found]


def plugins_used(config: Config) -> list[dict[str, Any]]:
    """Distribution, version and blocks of the plugins that the model is made of, the built-in one first."""
    blocks: dict[tuple[str, str], list[str]] = {(CORE[0], ultrazoo.__version__): []}
    for _, name in config.model.blocks_used:
        home = registry().home_of(name)
        blocks.setdefault((home.distribution, home.version), []).append(name)
    return [
        {"distribution": distribution, "version": version, "blocks": sorted(names)}
        for (distribution, version), names in blocks.items()
    ]
