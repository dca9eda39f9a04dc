"""Times a block at the lengths of a sweep against standard attention of the same width, and its ops at its shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ultrazoo.bench import inductor
from ultrazoo.bench.calls import as_sample, calls_of
from ultrazoo.bench.gate import kernel_of, require_parity
from ultrazoo.bench.ops import backend_names, differentiated, time_sample
from ultrazoo.bench.records import Task
from ultrazoo.bench.session import Bench
from ultrazoo.bench.timing import Case
from ultrazoo.callables import construct
from ultrazoo.config import ModelConfig, block_config, model_around
from ultrazoo.errors import ConfigError
from ultrazoo.ops import kernel_policy
from ultrazoo.ops.library import Policy
from ultrazoo.registry import registry
from ultrazoo.spec import BlockSpec, OpSpec

TOKENS = 2048
"""Tokens of a call, as long as no row is longer."""
WIDTH = 384
YARDSTICK = "standard_attn"


def bench_block(
    bench: Bench, spec: BlockSpec, lengths: Sequence[int], *, hidden_size: int = WIDTH, batch: int | None = None
) -> None:
    """Check the parity of a block's ops, then time block and ops at each length.

    Args:
        bench: The run.
        spec: The block.
        lengths: Tokens of a row.
        hidden_size: D; heads have about 64 channels.
        batch: Rows of a call; None fills a call up to 2048 tokens.

    Raises:
        ParityError: An op of the block does not compute what its reference computes.
        ConfigError: The block refuses the width, or is an embedding.
    """
    if spec.kind == "embedding":
        raise ConfigError(f"bench {spec.name}: an embedding is not timed alone; time a preset or YAML that uses it")
    ops = [registry().op(name) for name in spec.ops]
    ways = block_ways(ops, bench.device)
    yardstick = YARDSTICK if spec.kind == "mixer" and spec.name != YARDSTICK else None
    known = [*ways, inductor.TORCH_COMPILE, *([yardstick] if yardstick else [])]
    for op in ops:
        known += backend_names(op, bench) if op.differentiable or not bench.backward else []
    bench.check_backends(tuple(dict.fromkeys(known)))
    bench.parity += require_parity(ops, bench.device, bench.dtype, bench.say)
    config = model_around(spec, hidden_size)
    block = _build(bench, spec, config)
    other = _build(bench, registry().block("mixer", yardstick), config) if yardstick else None
    heads = f" H{config.retention_heads if 'retention_heads' in spec.config.model_fields else config.num_heads}"
    for length in lengths:
        rows = batch or max(1, TOKENS // length)
        x = torch.randn(rows, length, hidden_size).to(bench.device, bench.dtype)
        cases = {name: _case(bench, block, x, policy) for name, policy in ways.items() if bench.wants(name)}
        if bench.wants(inductor.TORCH_COMPILE, default=False):
            cases[inductor.TORCH_COMPILE] = _case(bench, block, x, "auto", inductor.compiled(bench, block))
        if other is not None and yardstick and bench.wants(yardstick):
            cases[yardstick] = _case(bench, other, x, "auto")
        task = Task(
            kind="block",
            name=spec.name,
            sample=f"B{rows} D{hidden_size}{heads if spec.kind == 'mixer' else ''} L{length}",
            direction=bench.direction,
            tokens=rows * length,
            batch=rows,
            length=length,
        )
        with torch.set_grad_enabled(bench.backward):
            bench.measure(task, f"{spec.kind} {spec.name}", cases)
        _time_ops(bench, ops, block, x, f"{spec.name} B{rows} L{length}")


def _time_ops(bench: Bench, ops: Iterable[OpSpec], block: nn.Module, x: Tensor, name: str) -> None:
    """Time each op on the arguments of its first call in the block."""
    with torch.no_grad():
        calls = calls_of(lambda: block(x), *{op.name.partition("::")[0] for op in ops})
    for op in ops:
        call = next((call for call in calls if call.name == op.name), None)
        if call is not None and (op.differentiable or not bench.backward):
            time_sample(bench, op, as_sample(op, call, name), family=f"in {name.partition(' ')[0]}")


def block_ways(ops: Iterable[OpSpec], device: torch.device) -> dict[str, Policy]:
    """Return backend -> kernel policy: one way for what uses no op, else with the kernels that there are and without.

    Where only some ops have a kernel the first way is called ``auto``. A plugin's op picks its kernel by itself: it
    makes no second way.
    """
    kernels = [status.compiled for op in ops if (status := kernel_of(op, device)) is not None]
    if not kernels:
        return {"torch": "auto"}
    if not any(kernels):
        return {"reference": "reference"}
    return (
        {"compiled": "compiled", "reference": "reference"}
        if all(kernels)
        else {"auto": "auto", "reference": "reference"}
    )


def _build(bench: Bench, spec: BlockSpec, config: ModelConfig) -> nn.Module:
    torch.manual_seed(0)
    return construct(spec, block_config(spec, config)).to(bench.device, bench.dtype).train(bench.backward)


def _case(bench: Bench, block: nn.Module, x: Tensor, policy: Policy, call: Callable[..., object] | None = None) -> Case:
    """A function that runs a block (or ``call``, made from it) under a kernel policy; with the gradients of its input
    and parameters if they are wanted."""
    function = block if call is None else call

    def forward() -> object:
        with kernel_policy(policy):
            return function(x)

    if not bench.backward:
        return forward
    x = x.detach().requires_grad_()
    return differentiated(forward, [x, *block.parameters()])
