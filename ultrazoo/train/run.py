"""One run from its config to its final table: run folder, data, model, trainer."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ultrazoo.config import Config
from ultrazoo.data import build_data
from ultrazoo.model import build_model
from ultrazoo.train.display import PlainDisplay, final_table, make_display
from ultrazoo.train.folder import RunFolder
from ultrazoo.train.loop import Trainer
from ultrazoo.train.metrics import JsonLines, TensorBoard, keep_until, set_aside
from ultrazoo.train.resume import check_match, find_checkpoint
from ultrazoo.train.runtime import environment, prepared
from ultrazoo.train.schedule import make_plan
from ultrazoo.train.signals import SignalGuard
from ultrazoo.train.store import CheckpointStore


def train(
    config: Config, *, run_dir: Path, resume: str | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Train a model as the config says and return the figures of the final table.

    Args:
        config: The whole configuration.
        run_dir: Run folder; made if it is not there.
        resume: None starts anew, ``auto`` continues from the newest whole checkpoint of the run folder if there is
            one, a path continues from that checkpoint or run folder.
        console: Where lines, the progress bar and the table go; unset: stderr.

    Raises:
        ConfigError: The run folder is in use or already holds another run, or an option cannot act here.
        DataError: The data cannot be read.
        CheckpointError: A checkpoint cannot be read, belongs to another run, or cannot be written.
        NonFiniteError: The loss or a gradient is not finite.
        StoppedError: A signal ended the run; its checkpoint is written.
    """
    console = console or Console(stderr=True)
    say = PlainDisplay(console, None).say
    training = config.training
    with ExitStack() as stack:
        folder = stack.enter_context(RunFolder(run_dir))
        device = stack.enter_context(prepared(training))
        store = CheckpointStore(folder.checkpoints, training.max_rolling_checkpoints, training.num_best_checkpoints)
        start = find_checkpoint(resume, store, say)
        store.tidy()
        data = build_data(training, config.model.vocab_size, say)
        if start is not None:
            hashes = {"tokenizer_sha256": data.tokenizer_sha256, "data_fingerprint": data.fingerprint}
            for note in check_match(start, config, **hashes):
                say(f"resume: changed since the checkpoint: {note}")
        plan = make_plan(training, data.rows_per_epoch)
        display = make_display(console, plan.total_steps)
        stack.callback(display.close)
        model = build_model(config.model)
        model.head.start_from(torch.from_numpy(data.unigram_counts))
        trainer = Trainer(config, model.to(device), data, plan, store, display)
        if start is not None:
            trainer.restore(start)
            keep_until(start.parents[1] / "metrics.jsonl", folder.metrics, trainer.progress.step)
            display.say(f"resume: continuing from {start}")
        elif (aside := set_aside(folder.metrics)) is not None:
            display.say(f"metrics of an earlier run that left no checkpoint are kept as {aside}")
        step = trainer.progress.step
        receipt = {**environment(device), "step": step, "resumed_from": str(start) if start else None}
        folder.describe(config.to_yaml(), data.vocabulary.text, receipt)
        trainer.reporters.append(JsonLines(folder.metrics))
        if "tensorboard" in training.report_to:
            trainer.reporters.append(TensorBoard(run_dir, step))
        for reporter in trainer.reporters:
            stack.callback(reporter.close)
        trainer.run(stack.enter_context(SignalGuard()))
        result = trainer.result(run_dir)
    console.print(final_table(result))
    return result
