"""Hydra (arXiv 2407.09941) for ultrazoo: the quasiseparable mixer, and two presets of nothing but it."""

from __future__ import annotations

from pathlib import Path

from ultrazoo import hookimpl
from ultrazoo.spec import BlockSpec, PresetSpec

__version__ = "0.1.0"
ULTRAZOO_PLUGIN_API = 1


@hookimpl
def ultrazoo_blocks() -> list[BlockSpec]:
    """The mixer."""
    from ultrazoo_hydra import block

    return [block.SPEC]


@hookimpl
def ultrazoo_presets() -> list[PresetSpec]:
    """The published encoder, and one that trains in minutes."""
    folder = Path(__file__).parent
    summaries = {
        "hydra": "Hydra's encoder as published: 23 layers, 768 wide, no feed-forward, no positions",
        "hydra_mini": "Hydra in minutes on two CPU cores: 4 layers, 128 wide",
    }
    return [PresetSpec(name=name, path=folder / f"{name}.yaml", summary=text) for name, text in summaries.items()]
