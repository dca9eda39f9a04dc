"""The records that plugins hand to ultrazoo: plain data, no behaviour.

One ``OpSpec`` feeds the dispatcher, the parity harness and the benchmarks; one ``BlockSpec`` feeds the config, the
model and the conformance kit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from pydantic import BaseModel
    from torch import nn

BlockKind = Literal["mixer", "ffn", "norm", "embedding"]
KINDS: tuple[BlockKind, ...] = ("mixer", "ffn", "norm", "embedding")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One call of an op: positional tensors and keyword arguments, with a short name for reports."""

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The least work that a call needs: floating-point operations, and bytes moved to and from memory."""

    flops: float
    bytes: float


@dataclass(frozen=True, kw_only=True)
class OpSpec:
    """An operator ``namespace::name`` with its mathematics, its samples and its cost.

    ``op`` is the public function, ``reference`` the readable one in plain torch. ``samples`` are small and nasty,
    ``bench_samples`` of realistic size; both are called with a device and a dtype. ``constants`` are the floating-point
    arguments that have no gradient; ``straight_through`` says that gradients are by definition not the derivatives.
    """

    name: str
    op: Callable[..., Any]
    reference: Callable[..., Any]
    samples: Callable[[torch.device, torch.dtype], Iterable[Sample]]
    bench_samples: Callable[[torch.device, torch.dtype], Iterable[Sample]]
    cost: Callable[[Sample], Cost]
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    differentiable: bool = True
    constants: tuple[str, ...] = ()
    straight_through: bool = False
    baselines: Mapping[str, Callable[..., Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """A block: its module, the pydantic class of its options, and what the conformance kit must hold it to.

    A field of ``config`` that bears the name of a field of the model section takes its value from there; every other
    field is an option of the block alone, set under ``model.block_options.<name>`` or, for a mixer, in its place in
    ``model.layer_pattern``.
    """

    name: str
    kind: BlockKind
    module: Callable[..., nn.Module]
    config: type[BaseModel]
    paper: str
    equation: str
    ops: tuple[str, ...] = ()
    bidirectional: bool = True
    state_size: Callable[[Any], int] | None = None
    """Numbers carried from one position to the next per sequence, from the block's config; None means all of them
    (attention keeps every key and value)."""
    residual: bool = True
    """Of a mixer: its output is added to its input. False: it replaces it, without dropout."""


@dataclass(frozen=True, kw_only=True)
class PresetSpec:
    """A named YAML configuration."""

    name: str
    path: Path
    summary: str
