"""What ``training.exact_balance_loss`` costs: interleaved steps with and without it, medians of processor time.

    OMP_NUM_THREADS=1 python bench/exact_balance.py [--preset mini] [--rows 4] [--micro-batches 2 4 8] [--repeats 7]

One thread, so that other programs on the machine do not count.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from ultrazoo.config import load_config
from ultrazoo.data.batch import Batch
from ultrazoo.model import IGNORED, build_model
from ultrazoo.train.amp import Precision
from ultrazoo.train.objective import accumulate
from ultrazoo.train.optim import build_optimizer
from ultrazoo.train.runtime import keep_memory


def make_batch(rows: int, length: int, vocabulary: int, share: float) -> Batch:
    """Random tokens, of which a share are targets."""
    ids = torch.randint(5, vocabulary, (rows, length))
    labels = ids.masked_fill(torch.rand(rows, length) >= share, IGNORED)
    return Batch(input_ids=ids, segments=torch.ones_like(ids), labels=labels, num_tokens=ids.numel())


def main() -> None:
    """Print one row for each number of micro-batches."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="mini")
    parser.add_argument("--rows", type=int, default=4, help="rows per micro-batch")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    config = load_config(options.preset).config
    torch.set_num_threads(1)
    keep_memory()
    torch.manual_seed(0)
    model = build_model(config.model).train()
    optimizer, _ = build_optimizer(model, config.training)
    precision = Precision(torch.device("cpu"), None)
    cpuinfo = Path("/proc/cpuinfo")
    names = {line.partition(": ")[2] for line in cpuinfo.read_text().splitlines() if line.startswith("model name")}
    print(f"{options.preset}, {options.rows} rows a micro-batch, one thread of {', '.join(names)}")
    for count in options.micro_batches:
        shape = (options.rows, config.training.max_length, config.model.vocab_size, config.training.mlm_probability)
        batches = [make_batch(*shape) for _ in range(count)]
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for repeat in range(options.repeats + 1):
            for exact in (False, True):
                begun = time.process_time()
                accumulate(model, batches, precision, exact_balance=exact)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if repeat:  # the first warms up
                    seconds[exact].append(time.process_time() - begun)
        plain, exact_ = (statistics.median(seconds[exact]) for exact in (False, True))
        ratios = [b / a - 1 for a, b in zip(seconds[False], seconds[True], strict=True)]
        print(
            f"{count} micro-batches: {plain:.3f} s, exact {exact_:.3f} s, {exact_ / plain - 1:+.1%} "
            f"(pairs {min(ratios):+.1%} to {max(ratios):+.1%})"
        )


if __name__ == "__main__":
    main()
