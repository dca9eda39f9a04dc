"""One run from its config to its final table: run folder, data, model, trainer."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ultrazoo.arguments import file_path
from ultrazoo.config import Config, TrainingConfig
from ultrazoo.config.paths import anchored, spelled_as
from ultrazoo.data import build_data
from ultrazoo.data.batch import Share
from ultrazoo.model import build_model
from ultrazoo.ops import prepare_blocks
from ultrazoo.output import only_messages
from ultrazoo.registry import registry
from ultrazoo.revisions import current_revisions, notes_on
from ultrazoo.train.agree import TeamGuard, TeamStore
from ultrazoo.train.checkpoint import load_model, read_config, read_state
from ultrazoo.train.display import PlainDisplay, final_table, make_display
from ultrazoo.train.folder import RunFolder
from ultrazoo.train.galore import load_projector
from ultrazoo.train.loop import Trainer
from ultrazoo.train.memory import memory_told
from ultrazoo.train.metrics import JsonLines
from ultrazoo.train.profile import StepProfiler
from ultrazoo.train.records import Record, set_aside, take_over
from ultrazoo.train.resume import check_match, check_weights, find_checkpoint, find_weights, revisions_of
from ultrazoo.train.runtime import environment, prepared
from ultrazoo.train.schedule import make_plan, note_on_batch
from ultrazoo.train.signals import SignalGuard
from ultrazoo.train.store import CheckpointStore
from ultrazoo.train.stretch import plan_of
from ultrazoo.train.team import joined
from ultrazoo.train.tensorboard import TensorBoard, load_package


def require_packages(training: TrainingConfig) -> None:
    """Ask for the optional packages that a run needs, before anything takes time.

    Raises:
        ConfigError: One is not installed.
    """
    if training.use_galore:
        load_projector()
    if "tensorboard" in training.report_to:
        load_package()


@only_messages()
def train(
    config: Config,
    *,
    run_dir: str | Path,
    resume: str | None = None,
    weights_only: bool = False,
    profile: range | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train a model as the config says and return the figures of the final table.

    Args:
        config: The whole configuration.
        run_dir: Run folder; made if it is not there.
        resume: None starts anew, ``auto`` continues from the newest whole checkpoint of the run folder if there is
            one, a path continues from that checkpoint or run folder.
        weights_only: Begin a new run with the weights of the checkpoint ``resume`` and nothing else of it.
        profile: Steps of this process, from 1, to profile; the trace is written to the run folder.
        console: Where lines, the progress bar and the table go; unset: stderr.

    Raises:
        ConfigError: The run folder is in use or already holds another run, a package that an option needs is not
            installed, or an option cannot act here.
        DataError: The data cannot be read.
        CheckpointError: A checkpoint cannot be read, belongs to another run, or cannot be written.
        NonFiniteError: The loss or a gradient is not finite.
        OutOfMemoryError: Memory ran out.
        StoppedError: A signal ended the run; its checkpoint is written.
        LostProcessError: Of the processes that torchrun started, one is gone or does not answer.
        FollowerError: The first of them ended, and says why.
        ArgumentError: ``run_dir`` is no path.
    """
    run_dir = file_path("run_dir", run_dir)
    config = config.model_copy(update={"training": anchored(config.training)})
    with memory_told(), ExitStack() as stack:
        team, training = stack.enter_context(joined(config.training))
        guard = stack.enter_context(SignalGuard(starting=True) if team.size == 1 else TeamGuard(team))
        console = Console(quiet=True) if not team.leads else console or Console(stderr=True)
        say = PlainDisplay(console, None).say
        require_packages(training)
        folder = RunFolder(run_dir)
        team.leader_says(lambda: stack.enter_context(folder) and None)
        team.leader_says(lambda: folder.claim(config.to_yaml(), training.tokenizer, say))
        device = stack.enter_context(prepared(training))
        blocks = [registry().block(kind, name) for kind, name in config.model.blocks_used]
        team.in_turn(lambda: prepare_blocks(blocks))  # before the clock, and any timeout of the processes, runs
        store = CheckpointStore(folder.checkpoints, training.max_rolling_checkpoints, training.num_best_checkpoints)
        start = None if weights_only else team.leader_says(lambda: find_checkpoint(resume, store, say))
        if resume == "auto" and start is None and (again := team.leader_says(folder.first_weights)):
            say(f"resume: the run begins with the weights of {again} again")
            resume, weights_only = again, True
        weights = team.leader_says(lambda: find_weights(resume, store)) if weights_only else None
        team.leader_says(store.tidy)
        job = team.leader_says(lambda: uuid.uuid4().hex)
        revisions = current_revisions() if start is None else revisions_of(start)
        saved: Mapping[str, Any] | None = None if start is None else read_state(start)["data"]
        data = team.in_turn(lambda: build_data(training, config.model.vocab_size, say, job, revisions, saved))
        data.share = Share(team.rank, team.size)
        if weights is not None:
            check_weights(weights, config, tokenizer_sha256=data.tokenizer_sha256)
        changed: list[str] = []
        if start is not None and saved is not None:
            hashes = {"tokenizer_sha256": data.tokenizer_sha256, "data_fingerprint": data.fingerprint_as_in(saved)}
            alike = spelled_as(config.training, read_config(start).get("training", {}))
            changed = check_match(start, config.model_copy(update={"training": alike}), **hashes)
            for note in changed:
                say(f"resume: changed since the checkpoint: {note}")
            for note in notes_on(revisions):
                say(f"resume: {note}")
        plan = make_plan(training, data.rows_per_epoch)
        if note := note_on_batch(training, data.rows_per_epoch):
            say(note)
        display = make_display(console, plan.total_steps)
        stack.callback(display.close)
        model = build_model(config.model)
        model.head.start_from(torch.from_numpy(data.unigram_counts))
        model.recompute_layers(training.gradient_checkpointing)
        if weights is not None:
            load_model(weights, model)
            display.say(f"weights from {weights}; optimiser, random numbers, data and step begin anew")
        shared = store if team.size == 1 else TeamStore(store, team)
        trainer = Trainer(config, model.to(device), data, plan, shared, display, team, revisions)
        trainer.run_id = job
        if start is not None:
            trainer.restore(start)
            display.say(f"resume: continuing from {start}")
        step = trainer.progress.step
        kept: list[Record] = []
        if team.leads and start is not None:
            kept = take_over(start, folder.metrics, display.say)
        elif team.leads and (aside := set_aside(folder.metrics)):
            display.say(f"metrics of an earlier run that left no checkpoint are kept as {aside}")
        receipt = {**environment(device), "step": step, "resumed_from": str(start) if start else None}
        receipt["weights_from"] = str(weights.resolve()) if weights else None
        receipt["changed"], receipt["plan"] = changed, plan_of(training)
        receipt["processes"], receipt["distributed"] = team.size, team.kind
        receipt["run_dir"] = str(run_dir.absolute())
        team.leader_says(lambda: folder.describe(config.to_yaml(), data.vocabulary.text, receipt, display.say))
        if team.leads:
            trainer.reporters.append(JsonLines(folder.metrics))
            if "tensorboard" in training.report_to:
                trainer.reporters.append(TensorBoard(run_dir, step, kept))
        for reporter in trainer.reporters:
            stack.callback(reporter.close)
        if profile is not None:
            profiler = StepProfiler(profile, trainer, run_dir / "profile.json", console)
            trainer.instead_of_step = profiler.step
            stack.callback(profiler.finish)
        stack.enter_context(memory_told(lambda: trainer.last_checkpoint))
        try:
            trainer.run(guard)
        finally:
            if data.left_out:
                display.say(f"data: skipped {data.left_out}")
        result = {**trainer.result(run_dir), "data_skipped": data.stats["skipped"]}
    console.print(final_table(result))
    return result
