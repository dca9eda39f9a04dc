"""What ``ultrazoo bench NAME`` does: finds the op, block or preset of that name and times it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ultrazoo.bench.blocks import WIDTH, bench_block
from ultrazoo.bench.models import bench_model
from ultrazoo.bench.ops import bench_op, family_of, length_of
from ultrazoo.bench.session import Bench
from ultrazoo.config import load_config
from ultrazoo.errors import ConfigError, UnknownNameError
from ultrazoo.ops import prepare, prepare_blocks
from ultrazoo.registry import registry
from ultrazoo.spec import BlockSpec, OpSpec

SWEEP = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Lengths of a block when none are asked for."""


def find(name: str) -> OpSpec | BlockSpec | str:
    """Return the op (``retention`` or ``ultrazoo::retention``) or the block of that name; a preset stays a name.

    Raises:
        UnknownNameError: There is none, or several plugins have an op of that name.
    """
    zoo = registry()
    ops = {full: spec for full, spec in zoo.ops().items() if name in (full, full.partition("::")[2])}
    if len(ops) > 1:
        raise UnknownNameError("bench", name, ops)
    if ops:
        return next(iter(ops.values()))
    blocks = {block: kind for kind in ("mixer", "ffn", "norm") for block in zoo.blocks(kind)}
    if name in blocks:
        return zoo.block(blocks[name], name)
    if name in zoo.presets() or name.endswith((".yaml", ".yml")):
        return name
    raise UnknownNameError("bench", name, [*(op.partition("::")[2] for op in zoo.ops()), *blocks, *zoo.presets()])


def prepare_for(what: OpSpec | BlockSpec | str) -> None:
    """Load or compile the kernels of what ``find`` returned, before anything is measured."""
    if isinstance(what, OpSpec):
        prepare([what.name])
    elif isinstance(what, BlockSpec):
        prepare_blocks([what])
    else:
        prepare_blocks(registry().block(*used) for used in load_config(what).config.model.blocks_used)


def require_lengths(what: OpSpec | BlockSpec | str, lengths: Sequence[int] | None) -> None:
    """Check that a run will have two lengths to draw a line through.

    Raises:
        ConfigError: It will not.
    """
    if lengths is not None:
        several = len(lengths) > 1
    elif isinstance(what, OpSpec):
        samples = list(what.bench_samples(torch.device("meta"), torch.float32))
        named = {(family_of(sample), length) for sample in samples if (length := length_of(sample)) is not None}
        several = len(named) > len({family for family, _ in named})
    else:
        several = isinstance(what, BlockSpec)
    if not several:
        raise ConfigError("--plot: got one length, expected at least two to draw a line; use --sweep 128..1024")


def run(
    bench: Bench,
    what: OpSpec | BlockSpec | str,
    lengths: Sequence[int] | None,
    *,
    hidden_size: int | None = None,
    batch: int | None = None,
) -> None:
    """Check parity and time; rows and verdicts are in ``bench`` afterwards.

    Args:
        bench: The run.
        what: From ``find``.
        lengths: Tokens of a row; None leaves them to what is timed.
        hidden_size: Width of a block.
        batch: Rows of a call of a block, or of a step of a model.

    Raises:
        ParityError: Something does not compute what its reference computes.
        ConfigError: An option does not fit.
    """
    given = {"--hidden-size": hidden_size, "--batch": batch}
    fitting = {OpSpec: (), BlockSpec: ("--hidden-size", "--batch"), str: ("--batch",)}[type(what)]
    for option, value in given.items():
        if value is not None and option not in fitting:
            kind = {OpSpec: "an op, whose sizes are its samples'", str: "a preset, whose width is its own"}[type(what)]
            raise ConfigError(f"{option}: got {value} for {kind}; leave it out")
    if isinstance(what, OpSpec):
        bench_op(bench, what, lengths)
    elif isinstance(what, BlockSpec):
        bench_block(bench, what, lengths or SWEEP, hidden_size=hidden_size or WIDTH, batch=batch)
    else:
        if bench.backward:
            raise ConfigError("--backward: a model is timed by its training step, which has one; leave it out")
        loaded = load_config(what)
        bench_model(bench, loaded.config, loaded.name, lengths, batch=batch)
    if not bench.rows:
        raise ConfigError(f"--backend: none of {', '.join(bench.backends or ())} could be timed; choose others")
