"""AdamW over parameter groups by the kind of module that owns each tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ultrazoo.config import TrainingConfig
from ultrazoo.train.galore import GaLoreAdamW, low_rank_names

FUSED_DEVICES = ("cpu", "cuda")


@dataclass
class Groups:
    """Parameter names with and without weight decay, and why the latter have none."""

    decayed: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)


def split_parameters(model: nn.Module) -> Groups:
    """Matrices of linear, convolution and embedding layers decay; vectors, norms and flagged tensors do not.

    A tensor with ``_no_weight_decay`` set on it (state-space parameters, position tables, scales) never decays. A
    tensor that several modules share is counted once, under its first name.
    """
    groups, seen = Groups(), set()
    for prefix, module in model.named_modules():
        for own, parameter in module.named_parameters(prefix=prefix, recurse=False):
            if parameter in seen or not parameter.requires_grad:
                continue
            seen.add(parameter)
            reason = _reason_to_keep(own.rpartition(".")[2], parameter, module)
            if reason is None:
                groups.decayed.append(own)
            else:
                groups.kept.append(own)
                groups.reasons[reason] += parameter.numel()
    return groups


def _reason_to_keep(name: str, parameter: nn.Parameter, module: nn.Module) -> str | None:
    if getattr(parameter, "_no_weight_decay", False):
        return "flagged"
    if "norm" in type(module).__name__.lower():
        return "norms"
    if name.endswith("bias"):
        return "biases"
    return "scalars and vectors" if parameter.ndim < 2 else None


def build_optimizer(
    model: nn.Module, training: TrainingConfig, tensors: Mapping[str, nn.Parameter] | None = None
) -> tuple[torch.optim.Optimizer, str]:
    """Return the optimiser and a line that sums up its groups.

    Args:
        model: The model.
        training: The training section.
        tensors: What to update in place of the model's own parameters, by name, such as shards of them.

    Raises:
        ConfigError: ``use_galore`` is set and its package is missing, or no weight is large enough for its rank.
    """
    groups = split_parameters(model)
    tensors = tensors or dict(model.named_parameters())
    fused = next(model.parameters()).device.type in FUSED_DEVICES
    low_rank = low_rank_names(model, training) if training.use_galore else set()
    decayed = [tensors[name] for name in groups.decayed if name not in low_rank]
    settings: dict[str, Any] = {
        "lr": training.learning_rate,
        "betas": (training.adam_beta1, training.adam_beta2),
        "eps": training.adam_epsilon,
    }
    param_groups = [
        {"params": decayed, "weight_decay": training.weight_decay},
        {"params": [tensors[name] for name in groups.kept], "weight_decay": 0.0},
    ]
    param_groups = [group for group in param_groups if group["params"]]
    optimizer: torch.optim.Optimizer
    if training.use_galore:
        projected = [tensors[name] for name in groups.decayed if name in low_rank]
        optimizer = GaLoreAdamW(
            param_groups,
            projected,
            rank=training.galore_rank,
            update_interval=training.galore_update_interval,
            scale=training.galore_scale,
            weight_decay=training.weight_decay,
            fused=fused,
            **settings,
        )
        size = sum(parameter.numel() for parameter in projected)
        note = f", {size:,} of them in {len(projected)} matrices at rank {training.galore_rank}"
    else:
        optimizer = torch.optim.AdamW(param_groups, fused=fused, **settings)
        note = ""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    count = sum(sizes[name] for name in groups.decayed)
    kept = ", ".join(f"{reason} {number:,}" for reason, number in groups.reasons.items()) or "none"
    return optimizer, f"adamw: {count:,} parameters decay by {training.weight_decay:g}{note}; without decay: {kept}"


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """True when the optimiser's own kernel skips an update that ``found_inf`` marks, with no host sync."""
    return isinstance(optimizer, torch.optim.AdamW) and all(group["fused"] for group in optimizer.param_groups)
