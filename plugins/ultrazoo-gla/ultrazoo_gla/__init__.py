"""Gated linear attention (arXiv 2312.06635) for ultrazoo: an op with its kernel, the mixer, and a preset."""

from __future__ import annotations

from pathlib import Path

from ultrazoo import hookimpl
from ultrazoo.spec import BlockSpec, OpSpec, PresetSpec

__version__ = "0.1.0"
ULTRAZOO_PLUGIN_API = 1


@hookimpl
def ultrazoo_ops() -> list[OpSpec]:
    """``gla::gated_linear_attention``."""
    from ultrazoo_gla import op

    return [op.SPEC]


@hookimpl
def ultrazoo_blocks() -> list[BlockSpec]:
    """The mixer."""
    from ultrazoo_gla import block

    return [block.SPEC]


@hookimpl
def ultrazoo_presets() -> list[PresetSpec]:
    """An encoder of gated linear attention."""
    path = Path(__file__).parent / "gla.yaml"
    return [PresetSpec(name=path.stem, path=path, summary="Gated linear attention: minutes on two CPU cores")]
