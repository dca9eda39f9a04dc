"""What more GPUs would do for a preset: a model of the step, not a measurement. ``python bench/scaling.py --help``.

Floating-point operations are counted on the very model of the preset, with shapes and no numbers. All else is an
assumption: a named constant below, printed with the table.
"""

from __future__ import annotations

import argparse
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import ultrazoo.nn.moe  # noqa: F401
from ultrazoo.config import load_config
from ultrazoo.model import MaskedLM, build_model
from ultrazoo.registry import registry
from ultrazoo.spec import Sample

PEAK_FLOPS = 989e12
"""H100 SXM, bfloat16, dense: the maker's figure."""
UTILISATION = 0.30
"""Assumed share of the peak that a step reaches on one GPU; replace it, once measured, with ``--tokens-per-second``."""
BACKWARD = 2.0
"""Operations of the backward pass over those of the forward pass."""
NVLINK_BYTES = 450e9 * 0.75
"""NVLink 4, each GPU, each way: 450 GB/s published, 75 % of it assumed to be reached by all-reduce."""
INFINIBAND_BYTES = 50e9 * 0.80
"""NDR InfiniBand, one 400 Gb/s adapter for each GPU, 80 % assumed."""
NVLINK_SECONDS, INFINIBAND_SECONDS = 20e-6, 40e-6
"""Assumed time of an all-reduce of a few numbers."""
MEMORY_BYTES = 3.35e12 * 0.7
"""H100's HBM3, published, 70 % assumed."""
OPTIMIZER_PASSES = 4 * 4 + 3 * 4
"""Bytes that AdamW reads (weight, gradient, two moments) and writes (three of them) for each parameter."""
PACKED_TOKENS = 60e6
"""Tokens that one core reads from the cache and packs in a second: measured here on the embedded corpus, 63.8 million.
Every process packs the rows of all, and masks its own; with ``dataloader_workers`` it is hidden."""
NODE = 8


@dataclass(frozen=True)
class Work:
    """What one token and one step cost."""

    flops: float
    """Of a forward pass, for each token."""
    parameters: int
    late: int
    """Parameters whose gradient is complete last, so that nothing is left to hide its exchange: the embeddings."""
    counts: int
    """All-reduces of expert counts in a forward pass."""


def count(name: str) -> Work:
    """Count the operations of a preset's forward pass for a row of its length."""
    config = load_config(name).config
    rows, length = 1, config.training.max_length
    specs = registry().ops()
    costs: dict[Any, Any] = {
        torch.ops.ultrazoo.grouped_matmul: lambda x, weight, ends, **_: 2 * x[0] * weight[1] * weight[2]
    }
    found: list[float] = []
    with FakeTensorMode(), FlopCounterMode(display=False, custom_mapping=costs) as counter, _Costs(specs, found):
        model: MaskedLM = build_model(config.model)
        ids = torch.zeros(rows, length, dtype=torch.int64)
        hidden = model.encode(ids)
        targets = max(1, round(config.training.mlm_probability * length))
        model.head(hidden[0, :targets], model.embeddings.tokens.weight)
    late = sum(p.numel() for name, p in model.named_parameters() if name.startswith("embeddings."))
    total = sum(p.numel() for p in model.parameters())
    layers = config.model.num_layers * config.model.num_loops * config.model.use_moe
    return Work((counter.get_total_flops() + sum(found)) / (rows * length), total, late, layers)


class _Costs(TorchDispatchMode):
    """Adds up what the specs of ultrazoo's own operators say that they cost."""

    def __init__(self, specs: Any, found: list[float]) -> None:
        super().__init__()
        self._specs, self._found = specs, found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split(".")[0]
        if name in self._specs:
            spec = self._specs[name]
            named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | (
                kwargs or {}
            )
            public = inspect.signature(spec.op).parameters
            first = tuple(named[p.name] for p in public.values() if p.kind is not p.KEYWORD_ONLY and p.name in named)
            rest = {p.name: named[p.name] for p in public.values() if p.kind is p.KEYWORD_ONLY and p.name in named}
            self._found.append(spec.cost(Sample(name=name, args=first, kwargs=rest)).flops)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Step:
    """Seconds of the parts of a step."""

    compute: float
    optimizer: float
    exchange: float
    hidden: float
    counts: float
    data: float

    @property
    def seconds(self) -> float:
        return self.compute + self.optimizer + self.exchange - self.hidden + self.counts + self.data


def step(work: Work, gpus: int, tokens: int, micro_batches: int, flops: float) -> Step:
    """Model one step of DDP.

    Args:
        work: What the model costs.
        gpus: Processes.
        tokens: Tokens of one micro-batch in one process.
        micro_batches: Micro-batches of a step; gradients are exchanged in the last.
        flops: Operations a second that one GPU really does.
    """
    one = work.flops * (1 + BACKWARD) * tokens / flops
    optimizer = work.parameters * OPTIMIZER_PASSES / MEMORY_BYTES
    data = gpus * tokens * micro_batches / PACKED_TOKENS
    if gpus == 1:
        return Step(one * micro_batches, optimizer, 0.0, 0.0, 0.0, data)
    inside = min(gpus, NODE)
    size = 4.0 * work.parameters
    # within a machine over NVLink; between machines each GPU exchanges its eighth over its own adapter
    seconds = 2 * (inside - 1) / inside * size / NVLINK_BYTES
    nodes = -(-gpus // NODE)
    seconds += 2 * (nodes - 1) / nodes * size / inside / INFINIBAND_BYTES
    late = seconds * work.late / work.parameters
    hidden = min(seconds - late, one * BACKWARD / (1 + BACKWARD))
    latency = NVLINK_SECONDS if nodes == 1 else INFINIBAND_SECONDS
    return Step(one * micro_batches, optimizer, seconds, hidden, work.counts * micro_batches * latency, data)


def main() -> None:
    parser = argparse.ArgumentParser(description="Model the step of a preset on 1, 8 and 64 GPUs.")
    parser.add_argument("--preset", default="frankenstein")
    parser.add_argument("--rows", type=int, default=16, help="rows of a micro-batch in each process")
    parser.add_argument("--utilisation", type=float, default=UTILISATION, help="share of the peak that a GPU reaches")
    parser.add_argument("--tokens-per-second", type=float, help="measured on one GPU, in place of the assumption")
    arguments = parser.parse_args()
    work = count(arguments.preset)
    length = load_config(arguments.preset).config.training.max_length
    tokens = arguments.rows * length
    per_token = work.flops * (1 + BACKWARD)
    flops = (
        arguments.tokens_per_second * per_token if arguments.tokens_per_second else PEAK_FLOPS * arguments.utilisation
    )
    print(
        f"{arguments.preset}: {work.flops / 1e9:.2f} GFLOP forward, {per_token / 1e9:.2f} GFLOP with backward a token"
    )
    print(
        f"{work.parameters:,} parameters, {4 * work.parameters / 1e9:.2f} GB of gradients, {work.late:,} of them last"
    )
    print(f"{arguments.rows} rows of {length} tokens in each process; {flops / 1e12:.0f} TFLOP/s a GPU (modelled)\n")
    print("| GPUs | micro-batches | tokens a step | compute | optimiser | exchange | hidden | experts | data | step "
          "| tokens/s | efficiency |\n|---|---|---|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for micro_batches in (1, 4):
        alone = step(work, 1, tokens, micro_batches, flops).seconds
        for gpus in (1, 8, 64):
            parts = step(work, gpus, tokens, micro_batches, flops)
            all_tokens = tokens * micro_batches * gpus
            times = [
                parts.compute,
                parts.optimizer,
                parts.exchange,
                parts.hidden,
                parts.counts,
                parts.data,
                parts.seconds,
            ]
            cells = " | ".join(f"{1e3 * value:.1f} ms" for value in times)
            rate = all_tokens / parts.seconds
            print(
                f"| {gpus} | {micro_batches} | {all_tokens:,} | {cells} | {rate:,.0f} | {alone / parts.seconds:.0%} |"
            )


if __name__ == "__main__":
    main()
