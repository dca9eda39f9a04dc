"""EmbBERT (arXiv 2502.10001) for ultrazoo: its block, its embeddings, and the preset that puts them together."""

from __future__ import annotations

from pathlib import Path

from ultrazoo import hookimpl
from ultrazoo.spec import BlockSpec, PresetSpec

__version__ = "0.1.0"
ULTRAZOO_PLUGIN_API = 1


@hookimpl
def ultrazoo_blocks() -> list[BlockSpec]:
    """The mixer and the embeddings."""
    from ultrazoo_embbert import block, embeddings

    return [block.SPEC, embeddings.SPEC]


@hookimpl
def ultrazoo_presets() -> list[PresetSpec]:
    """The published encoder."""
    path = Path(__file__).parent / "embbert_exact.yaml"
    return [PresetSpec(name=path.stem, path=path, summary="EmbBERT as published: 357,248 parameters, no residual")]
