"""What a training step costs, found before the first one: floating-point operations, and peak memory on the CPU.

Operations are counted by torch's ``FlopCounterMode`` on few rows, with the cost functions of ``OpSpec`` for the
operators of ultrazoo and plugins, and scaled to the rows and targets of a step. Memory is measured in a process of its
own that takes two steps, because the heap of the C library grows well beyond the tensors that are alive: on all rows of
a batch if that is quick, else on fewer and on half as many, from which it is extrapolated.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ultrazoo.bench.calls import Call, as_sample
from ultrazoo.config import Config, config_from_dict
from ultrazoo.data.batch import Batch
from ultrazoo.errors import UltrazooError
from ultrazoo.model import IGNORED, MaskedLM, build_model
from ultrazoo.nn.tiles import ROW_TILE
from ultrazoo.registry import registry
from ultrazoo.spec import OpSpec
from ultrazoo.train.amp import make_precision
from ultrazoo.train.memory import SIGNS, OutOfMemoryError
from ultrazoo.train.objective import accumulate
from ultrazoo.train.optim import build_optimizer
from ultrazoo.train.runtime import memory_bytes, prepared

PROBE_SECONDS = 30.0
"""CPU time for measuring memory, about; more rows than fit are extrapolated."""
SMALLEST_PROBE = 4
"""Rows that are measured at least, if the batch has them; the heap of 1 and 2 rows says too little about many."""
STEPS, MOST_PARTS = 2, 2
"""Steps and micro-batches that are measured: the first step makes the optimizer's state, and further ones repeat it."""
COUNTED_TOKENS = 512
"""Tokens whose operations are counted, at least if a batch has them: the tiles of experts are part of the count."""
BACKWARD_FACTOR = 2.0
"""Operations of an operator's backward over those of its forward: a product has two, one per factor."""
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on the CPU beyond those before the model is built."""

    weights: int
    gradients: int
    optimizer: int
    peak: int
    rows: tuple[int, ...]
    """Rows per micro-batch that were measured; fewer than those of a batch are extrapolated."""

    @property
    def activations(self) -> int:
        """The rest of the peak: activations, temporaries, and what the allocator and the libraries keep."""
        return self.peak - self.weights - self.gradients - self.optimizer

    @property
    def basis(self) -> str:
        """How the peak was found."""
        verb = "extrapolated from" if len(self.rows) > 1 else "measured with"
        return f"{verb} {' and '.join(map(str, self.rows))} rows per micro-batch"

    def table(self) -> list[tuple[str, str]]:
        """Rows for people."""
        sizes = {name: f"{getattr(self, name) / 2**20:,.1f} MiB" for name in ("weights", "gradients", "optimizer")}
        kept = f"{self.activations / 2**20:,.1f} MiB, with temporaries and what the allocator keeps"
        peak = f"{self.peak / 2**20:,.1f} MiB at the peak of a step on the CPU, {self.basis}"
        return [*sizes.items(), ("activations", kept), ("expected memory", peak)]


def count_flops(model: MaskedLM, config: Config) -> tuple[float, float]:
    """Return the operations of a step, forward and backward, and the CPU seconds of one row of it."""
    training = config.training
    length = training.max_length
    few = -(-2 * ROW_TILE // length)  # rows that have room for two tiles of targets
    tile = _count(model, config, few, 2 * ROW_TILE) - _count(model, config, few, ROW_TILE)
    rows = max(few, min(training.batch_size, -(-COUNTED_TOKENS // length)))
    begun = time.process_time()
    counted = _count(model, config, rows, ROW_TILE) - tile
    seconds = (time.process_time() - begun) / rows
    tiles = -(-training.batch_size * length * training.mlm_probability // ROW_TILE)
    batch = counted / rows * training.batch_size + tiles * tile
    return batch * training.gradient_accumulation_steps, seconds


def measure_memory(config: Config, seconds: float) -> Memory | None:
    """Measure the peak of a training step in processes of their own; None where the system reports no peak.

    Args:
        config: The whole configuration.
        seconds: CPU time of one row of a micro-batch.

    Raises:
        OutOfMemoryError: There is not enough memory for what is measured.
        UltrazooError: The measurement failed.
    """
    if not (STATUS.exists() and CLEAR.exists()):
        return None
    batch_size = config.training.batch_size
    parts = min(config.training.gradient_accumulation_steps, MOST_PARTS) * STEPS
    rows = batch_size
    while rows > SMALLEST_PROBE and seconds * parts * rows > PROBE_SECONDS:
        rows = -(-rows // 2)
    sizes = (rows,) if rows == batch_size else (-(-rows // 2), rows)
    found = [_in_a_process(config, size) for size in sizes]
    peak = found[-1].pop("peak")
    if len(sizes) > 1:
        peak += (peak - found[0]["peak"]) * (batch_size - sizes[1]) // (sizes[1] - sizes[0])
    return Memory(**found[-1], peak=peak, rows=sizes)


def probe(config: Config, rows: int) -> dict[str, int]:
    """Take steps of random rows in this process; return the bytes of weights, gradients, optimizer and the peak."""
    training = config.training.model_copy(update={"device": "cpu"})
    with prepared(training) as device:
        before = memory_bytes(device)
        CLEAR.write_text("5")  # forgets the peak so far
        model = build_model(config.model).train()
        model.recompute_layers(training.gradient_checkpointing)
        optimizer, _ = build_optimizer(model, training)
        precision = make_precision(device, training.use_amp)
        for _ in range(STEPS):
            parts = range(min(training.gradient_accumulation_steps, MOST_PARTS))
            batches = [_batch(config, rows) for _ in parts]
            accumulate(model, batches, precision, exact_balance=training.exact_balance_loss)
            gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        status = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        state = [value for entry in optimizer.state.values() for value in entry.values()]
    return {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": gradients,
        "optimizer": sum(value.nbytes for value in state),
        "peak": int(status["VmHWM"].split()[0]) * 1024 - before,
    }


def _in_a_process(config: Config, rows: int) -> dict[str, int]:
    """``probe`` in a process that has done nothing else."""
    task = json.dumps({"config": config.to_dict(), "rows": rows})
    command = [sys.executable, "-m", "ultrazoo.bench.footprint"]
    done = subprocess.run(command, input=task, capture_output=True, text=True)
    if done.returncode == 0:
        found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
        return found
    where = f"memory of a step: the process that takes it with {rows} rows"
    if done.returncode == -signal.SIGKILL or any(sign in done.stderr for sign in SIGNS):
        raise OutOfMemoryError(f"{where} ran out of memory; lower training.batch_size or the size of the model")
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    raise UltrazooError(f"{where} ended with exit code {done.returncode}: {last}")


def _batch(config: Config, rows: int, targets: int | None = None) -> Batch:
    """Full rows of random tokens, as many of them targets as masking draws, or the given number."""
    ids = torch.randint(config.model.vocab_size, (rows, config.training.max_length))
    chosen = torch.rand(ids.shape) < config.training.mlm_probability
    if targets is not None:
        chosen = torch.arange(ids.numel()).view_as(ids) < targets
    labels = ids.masked_fill(~chosen, IGNORED)
    return Batch(input_ids=ids, segments=torch.ones_like(ids), labels=labels, num_tokens=ids.numel())


def _count(model: MaskedLM, config: Config, rows: int, targets: int) -> float:
    """Operations of the forward and backward passes of some rows; the gradients are removed."""
    precision = make_precision(torch.device("cpu"), config.training.use_amp)
    counter = FlopCounterMode(display=False, custom_mapping=_formulas())
    with counter:
        accumulate(model, [_batch(config, rows, targets)], precision)
    model.zero_grad(set_to_none=True)
    return float(counter.get_total_flops())


def _formulas() -> dict[Any, Callable[..., float]]:
    """Operators of the registry -> their cost, and ``NAME_backward`` -> that of the forward call it belongs to."""
    formulas: dict[Any, Callable[..., float]] = {}
    for name, spec in registry().ops().items():
        namespace, _, short = name.partition("::")
        operators = getattr(torch.ops, namespace)
        made: list[float] = []
        if hasattr(operators, short):
            formulas[getattr(operators, short)] = _raw(_forward(spec, getattr(operators, short).default, made))
        if hasattr(operators, f"{short}_backward"):
            formulas[getattr(operators, f"{short}_backward")] = _raw(_backward(made))
    return formulas


def _forward(spec: OpSpec, operator: Any, made: list[float]) -> Callable[..., float]:
    def cost(*args: Any, **kwargs: Any) -> float:
        made.append(spec.cost(as_sample(spec, Call(operator, args, None), "step")).flops)
        return made[-1]

    return cost


def _backward(made: list[float]) -> Callable[..., float]:
    """Backward calls come in the reverse order of the forward calls; recomputed ones come just before theirs."""

    def cost(*args: Any, **kwargs: Any) -> float:
        return BACKWARD_FACTOR * made.pop()

    return cost


def _raw(formula: Callable[..., float]) -> Callable[..., float]:
    """Mark a formula as one that takes tensors, not shapes, as torch's ``register_flop_formula(get_raw=True)`` does."""
    formula._get_raw = True  # type: ignore[attr-defined]
    return formula


if __name__ == "__main__":
    given = json.load(sys.stdin)
    print(json.dumps(probe(config_from_dict(given["config"], "config"), given["rows"])))
