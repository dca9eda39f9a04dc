"""GaLore against AdamW: bytes of optimiser state, time of an update, loss after as many steps.

    python bench/galore.py

Needs galore-torch. Bytes and times: four layers of standard attention, 768 wide, at ``galore_rank`` 128; times are CPU
time of one thread, the two optimisers in turn on the same gradients, and a new basis is paid for once every 200 steps.
Loss: 256 wide, four layers, rank 64, the embedded texts, the same batches and seed for each.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ultrazoo.config import Config, config_from_dict
from ultrazoo.model import build_model
from ultrazoo.train.optim import build_optimizer

INTERVAL = 200
WIDE = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_layers": 4,
    "num_heads": 12,
    "ffn_hidden_size": 3072,
    "ffn_activation": "gelu",
}
NARROW = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "num_layers": 4,
    "num_heads": 4,
    "ffn_hidden_size": 1024,
    "ffn_activation": "gelu",
    "dropout": 0.0,
}


def config(model: dict[str, Any], **training: Any) -> Config:
    """A configuration with no preset behind it."""
    return config_from_dict({"model": model, "training": {"num_threads": 1, **training}}, "bench/galore.py")


def state_bytes(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> int:
    """Bytes of the state that belongs to the parameters."""
    return sum(t.numel() * t.element_size() for p in parameters for t in optimizer.state[p].values())


def sizes_and_times(rounds: int) -> None:
    """Print bytes and times at 768 wide."""
    torch.manual_seed(0)
    model = build_model(config(WIDE).model)
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * 1e-3
    plain, _ = build_optimizer(model, config(WIDE).training)
    galore, note = build_optimizer(model, config(WIDE, use_galore=True, galore_update_interval=INTERVAL).training)
    print(note)
    seconds: dict[str, list[float]] = {"AdamW": [], "GaLore": []}
    start = time.thread_time()
    galore.step()  # computes every basis
    first = time.thread_time() - start
    plain.step()
    for _ in range(rounds):
        for name, optimizer in (("AdamW", plain), ("GaLore", galore)):
            start = time.thread_time()
            optimizer.step()
            seconds[name].append(time.thread_time() - start)
    projected = [p for p in parameters if "basis" in galore.state[p]]
    for name, chosen in (("projected weights", projected), ("whole model", parameters)):
        adam, low = state_bytes(plain, chosen), state_bytes(galore, chosen)
        print(f"  {name}: {adam / 1e6:.1f} MB with AdamW, {low / 1e6:.1f} MB with GaLore, {adam / low:.2f} x less")
    adam_ms, low_ms = (statistics.median(values) * 1e3 for values in seconds.values())
    svd = first * 1e3 - low_ms
    print(
        f"  an update: AdamW {adam_ms:.0f} ms, GaLore {low_ms:.0f} ms between new bases; new bases {svd:,.0f} ms, "
        f"{svd / INTERVAL:.0f} ms a step at an interval of {INTERVAL}: {low_ms + svd / INTERVAL:.0f} ms"
    )


def losses(steps: int) -> None:
    """Print the loss after as many steps."""
    from rich.console import Console

    from ultrazoo.train import train

    ways: dict[str, dict[str, Any]] = {
        "AdamW": {},
        "GaLore, rank 64, scale 0.25": {"use_galore": True},
        "GaLore, rank 64, scale 1": {"use_galore": True, "galore_scale": 1.0},
    }
    for name, options in ways.items():
        if options:
            options |= {"galore_rank": 64, "galore_update_interval": 50}
        common = {"max_steps": steps, "batch_size": 16, "learning_rate": 1e-3, "eval_max_batches": 8, "use_amp": True}
        often = {"eval_every_n_steps": steps, "checkpoint_every_n_steps": steps, "max_rolling_checkpoints": 1}
        with tempfile.TemporaryDirectory() as folder:
            whole = config(NARROW, **common, **often, **options)
            result = train(whole, run_dir=Path(folder) / "run", console=Console(quiet=True))
        print(
            f"  {name}: validation loss {result['validation_loss']:.3f} after {steps} steps "
            f"(unigram entropy {result['unigram_entropy']:.3f})",
            flush=True,
        )


def main() -> None:
    """Print all figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=150)
    given = parser.parse_args()
    torch.set_num_threads(1)
    sizes_and_times(given.rounds)
    losses(given.steps)


if __name__ == "__main__":
    main()
