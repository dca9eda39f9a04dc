"""Times one training step of ultrazoo against transformers' BertForMaskedLM under its Trainer, on the same documents.

    python bench/mlm_training.py --size tinybert --threads 1 --rounds 8 --data texts/

Each way has a process of its own, with its own allocator, and takes one step per round, in turn and never at the same
time as another. A step's tokens are those that are not padding. transformers is needed for its rows; without it only
ultrazoo's are measured. Seconds are CPU time of the process with one thread, else wall-clock time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

PRESETS = {"tinybert": "tinybert", "base": "standard"}
ROWS = {"tinybert": 32, "base": 8}
"""Rows of the peer's batch, the same for us: its default of 8 is slower at this size."""
LENGTH = 128
WAYS = {
    "ultrazoo bf16": {"amp": True},
    "ultrazoo fp32": {"amp": False},
    "transformers fp32": {"peer": True, "amp": False, "compiled": False},
    "transformers bf16": {"peer": True, "amp": True, "compiled": False},
    "transformers bf16 compiled": {"peer": True, "amp": True, "compiled": True},
}
WARM = 6
"""Rounds before the first that counts: torch.compile takes some, and the allocator to grow."""
Step = Callable[[], int]
"""Takes an optimiser step; returns how many real tokens it read."""


def our_step(size: str, data: str | None, amp: bool, scratch: Path) -> Step:
    """One step of ultrazoo's trainer as ``ultrazoo train`` takes it."""
    import torch
    from rich.console import Console

    from ultrazoo.config import load_config
    from ultrazoo.data import build_data
    from ultrazoo.model import build_model
    from ultrazoo.train.display import make_display
    from ultrazoo.train.loop import Trainer
    from ultrazoo.train.runtime import prepared
    from ultrazoo.train.schedule import make_plan
    from ultrazoo.train.store import CheckpointStore

    options = {"max_steps": 10**6, "batch_size": ROWS[size], "gradient_accumulation_steps": 1, "max_length": LENGTH}
    sets = [f"training.{name}={value}" for name, value in {**options, "use_amp": str(amp).lower()}.items()]
    if data:
        sets.append(f"training.local_parquet_dir={data}")
    config = load_config(PRESETS[size], sets).config
    prepared(config.training).__enter__()  # for the life of this process
    texts = build_data(config.training, config.model.vocab_size, lambda line: None)
    model = build_model(config.model)
    model.head.start_from(torch.from_numpy(texts.unigram_counts))
    plan = make_plan(config.training, texts.rows_per_epoch)
    display = make_display(Console(stderr=True, quiet=True), plan.total_steps)
    trainer = Trainer(config, model, texts, plan, CheckpointStore(scratch, 0, 0), display)
    trainer._batches = texts.train_batches()

    def step() -> int:
        before = trainer.progress.tokens
        trainer.step()
        return trainer.progress.tokens - before

    return step


def peer_step(size: str, data: str | None, amp: bool, compiled: bool, scratch: Path) -> Step:
    """One step of BertForMaskedLM as transformers' Trainer takes it, everything at its defaults."""
    import torch
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        DataCollatorForLanguageModeling,
        PreTrainedTokenizerFast,
        Trainer,
        TrainingArguments,
    )

    from ultrazoo.config import load_config
    from ultrazoo.data import build_data

    sets = [f"training.local_parquet_dir={data}"] if data else []
    config = load_config(PRESETS[size], sets).config
    texts = build_data(config.training, config.model.vocab_size, lambda line: None)
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    tokens = {f"{name}_token": value for name, value in names.items()}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=texts.tokenizer, **tokens)
    rows = [tokenizer(text, truncation=True, max_length=LENGTH) for text in documents(config.training)]
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=config.model.vocab_size,
            hidden_size=config.model.hidden_size,
            num_hidden_layers=config.model.num_layers,
            num_attention_heads=config.model.num_heads,
            intermediate_size=config.model.ffn_hidden_size,
        )
    )
    arguments = TrainingArguments(
        str(scratch),
        per_device_train_batch_size=ROWS[size],
        use_cpu=True,
        bf16=amp,
        torch_compile=compiled,
        max_steps=10**6,
        report_to=[],
        disable_tqdm=True,
    )
    collator = DataCollatorForLanguageModeling(tokenizer)
    trainer = Trainer(model=model, args=arguments, data_collator=collator, train_dataset=rows)
    trainer.create_optimizer_and_scheduler(arguments.max_steps)
    trainer.model_wrapped = trainer.accelerator.prepare(model)  # autocast, and torch.compile where it is asked for
    trainer.current_gradient_accumulation_steps = 1
    model.train()
    batches = endless(trainer.get_train_dataloader())

    def step() -> int:
        batch = next(batches)
        trainer.training_step(trainer.model_wrapped, batch)
        torch.nn.utils.clip_grad_norm_(model.parameters(), arguments.max_grad_norm)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        model.zero_grad()
        return int(batch["attention_mask"].sum())

    return step


def documents(training: Any, most: int = 4000) -> list[str]:
    """The first texts of the run's own files."""
    import pyarrow.parquet as parquet

    from ultrazoo.data.finding import find_files

    texts: Iterator[str] = (
        text
        for path in find_files(training.local_parquet_dir).files
        for batch in parquet.ParquetFile(path).iter_batches(columns=[training.text_column])
        for text in batch.column(0).to_pylist()
        if text
    )
    return list(islice(texts, most))


def endless(loader: Any) -> Iterator[Any]:
    """The batches of a loader, epoch after epoch."""
    while True:
        yield from loader


def serve(way: str, size: str, data: str | None, threads: int) -> None:
    """Take a step for every line on stdin, and print its seconds and tokens."""
    import torch

    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    options = dict(WAYS[way])
    make: Any = peer_step if options.pop("peer", False) else our_step
    with tempfile.TemporaryDirectory() as scratch:
        step = make(size, data, scratch=Path(scratch), **options)
        print("READY", flush=True)
        for _ in sys.stdin:
            start = clock()
            tokens = step()
            print(json.dumps([clock() - start, tokens]), flush=True)


def main() -> None:
    """Start a process for each way, let them take steps in turn, print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=PRESETS, default="tinybert")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--data", help="Parquet file or folder; unset: the embedded texts")
    parser.add_argument("--ways", nargs="*", choices=WAYS)
    parser.add_argument("--serve", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        return serve(given.serve, given.size, given.data, given.threads)
    peers = importlib.util.find_spec("transformers") and importlib.util.find_spec("accelerate")
    ways = [way for way in given.ways or WAYS if peers or not WAYS[way].get("peer")]
    if not peers:
        print("transformers and accelerate are not installed: only ultrazoo is measured")
    options = ["--size", given.size, "--threads", str(given.threads), *(["--data", given.data] if given.data else [])]
    running = {way: start(way, options, given.threads) for way in ways}
    found: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(WARM + given.rounds):
        for way, process in running.items():
            seconds, tokens = ask(process)
            if number >= WARM:
                found[way].append(tokens / seconds)
    for process in running.values():
        process.stdin.close()
        process.wait()
    print(f"{given.size}, length {LENGTH}, {ROWS[given.size]} rows a step, {given.threads} thread(s), tokens/s:")
    for way, rates in found.items():
        low, middle, high = statistics.quantiles(rates, n=4)
        print(f"  {way:<28} {middle:>8,.0f}  ({low:,.0f} to {high:,.0f})")


def start(way: str, options: list[str], threads: int) -> Any:
    """A process that serves a way, with its model and data ready."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--serve", way, *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "READY":
            return process
    raise SystemExit(f"{way}: ended with status {process.wait()} before its first step")


def ask(process: Any) -> tuple[float, int]:
    """Let a process take one step: seconds, tokens."""
    process.stdin.write("\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("["):
            seconds, tokens = json.loads(line)
            return float(seconds), int(tokens)
    raise SystemExit(f"a process ended with status {process.wait()} in a step")


if __name__ == "__main__":
    main()
