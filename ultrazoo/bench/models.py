"""Times the training step of a whole model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ultrazoo.bench.blocks import block_ways
from ultrazoo.bench.calls import calls_of
from ultrazoo.bench.gate import require_parity
from ultrazoo.bench.records import Task
from ultrazoo.bench.session import Bench
from ultrazoo.bench.timing import Case
from ultrazoo.config import Config
from ultrazoo.model import IGNORED, MaskedLM, build_model
from ultrazoo.ops import kernel_policy
from ultrazoo.ops.library import Policy
from ultrazoo.registry import registry
from ultrazoo.spec import OpSpec
from ultrazoo.train.amp import make_precision
from ultrazoo.train.optim import build_optimizer

PROBE_LENGTH = 8


def bench_model(
    bench: Bench, config: Config, name: str, lengths: Sequence[int] | None = None, *, batch: int | None = None
) -> None:
    """Check the parity of a model's ops, then time forward, backward and the optimiser's update on random tokens.

    Args:
        bench: The run; a half dtype means mixed precision.
        config: The model and how it is trained.
        name: The preset's.
        lengths: Tokens of a row; None takes the config's max_length.
        batch: Rows of a step; None takes the config's batch_size.

    Raises:
        ParityError: An op of the model does not compute what its reference computes.
    """
    torch.manual_seed(config.training.seed)
    model = build_model(config.model).to(bench.device)
    ops = ops_of(model)
    ways = block_ways(ops, bench.device)
    bench.check_backends(tuple(ways))
    bench.parity += require_parity(ops, bench.device, bench.dtype, bench.say)
    for length in lengths or [config.training.max_length]:
        rows = batch or config.training.batch_size
        task = Task(
            kind="model",
            name=name,
            sample=f"B{rows} L{length}",
            direction="training step",
            tokens=rows * length,
            batch=rows,
            length=length,
        )
        cases = {way: _step(bench, model, config, rows, length, p) for way, p in ways.items() if bench.wants(way)}
        bench.measure(task, f"model {name}", cases)


def ops_of(model: MaskedLM) -> list[OpSpec]:
    """Return the ops that one pass of a model calls, whatever its blocks are."""
    known = registry().ops()
    device = next(model.parameters()).device
    tokens = torch.zeros(1, PROBE_LENGTH, dtype=torch.int64, device=device)
    with torch.no_grad():
        calls = calls_of(lambda: model(tokens), *{name.partition("::")[0] for name in known})
    return [known[name] for name in dict.fromkeys(call.name for call in calls) if name in known]


def _step(bench: Bench, model: MaskedLM, config: Config, rows: int, length: int, policy: Policy) -> Case:
    """One step on random tokens, with a target where the config would mask."""
    size = (rows, length)
    tokens = torch.randint(config.model.vocab_size, size, device=bench.device)
    targets = torch.rand(size, device=bench.device) < config.training.mlm_probability
    targets[0, 0] = True
    labels = torch.where(targets, tokens, IGNORED)
    optimizer, _ = build_optimizer(model, config.training)
    precision = make_precision(bench.device, bench.dtype != torch.float32)

    def step() -> object:
        with kernel_policy(policy), precision.autocast():
            output = model(tokens, labels=labels)
            loss = output.loss_sum / output.num_targets + sum(output.losses.values())
        precision.backward(loss)
        precision.scaler.step(optimizer)
        precision.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step
