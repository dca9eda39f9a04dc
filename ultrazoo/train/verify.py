"""Takes the last steps of a run again, from an earlier checkpoint, and compares what comes out bit for bit."""

from __future__ import annotations

import json
import signal
import tempfile
from collections.abc import Callable, Collection
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import ultrazoo
from ultrazoo.arguments import file_path, whole_number
from ultrazoo.config import config_from_dict
from ultrazoo.data import build_data
from ultrazoo.data.batch import Share
from ultrazoo.errors import CheckpointError
from ultrazoo.model import build_model
from ultrazoo.train.agree import TeamStore
from ultrazoo.train.checkpoint import (
    MODEL,
    OPTIMIZER,
    Snapshot,
    on_host,
    read_config,
    read_state,
    read_tensors,
)
from ultrazoo.train.display import PlainDisplay
from ultrazoo.train.folder import RunFolder
from ultrazoo.train.loop import Trainer
from ultrazoo.train.memory import memory_told
from ultrazoo.train.metrics import JsonLines
from ultrazoo.train.records import Record, Say, lines_behind, parse_records, read_lines
from ultrazoo.train.resume import check_match, revisions_of
from ultrazoo.train.runtime import prepared
from ultrazoo.train.schedule import make_plan
from ultrazoo.train.signals import SignalGuard, StoppedError
from ultrazoo.train.store import CheckpointStore
from ultrazoo.train.stretch import Part, choose, parts_of, require_repeatable
from ultrazoo.train.team import joined

TIMED = frozenset({"seconds", "tokens_per_second", "data_wait_share", "memory_bytes"})
"""Entries of a record that no two runs share."""
STATE = ("rng", "rng_others", "data", "window", "scaler", "watch")
BESIDE_ORDER = {"seen", "skipped", "damage", "fingerprint", "hashing", "discovery"}
"""Entries of the data's state that do not say which rows come next: counts, and what the data is recognised by."""
Differences = list[tuple[int, str]]
"""Steps, and what differs at each."""


@dataclass(kw_only=True)
class Verification:
    """What was compared, how much of it differs, and the first difference in the order of the steps."""

    start: str | None
    checkpoints: list[str] = field(default_factory=list)
    """Checkpoints that were compared, oldest first."""
    steps: int = 0
    compared: dict[str, int] = field(default_factory=dict)
    differ: dict[str, int] = field(default_factory=dict)
    first_difference: str | None = None
    first_step: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """One line."""
        if self.first_difference is None:
            return f"equal to the last bit over {self.steps} steps"
        notes = f" ({'; '.join(self.notes)})" if self.notes else ""
        return f"differs: {self.first_difference}{notes}"

    def add(self, what: str, count: int, differences: Differences) -> None:
        """Count a comparison; the difference of the earliest step is kept."""
        self.compared[what] = self.compared.get(what, 0) + count
        for step, text in differences:
            self.differ[what] = self.differ.get(what, 0) + 1
            if self.first_step is None or step < self.first_step:
                self.first_step, self.first_difference = step, f"step {step}: {text}"


def _order_alone(state: dict[str, Any]) -> dict[str, Any]:
    """A state without counts, which a cache of tokens does not take, and without what data is recognised by."""
    return state | {"data": {name: value for name, value in state["data"].items() if name not in BESIDE_ORDER}}


class _Again(CheckpointStore):
    """Compares with the checkpoints of a run instead of writing any."""

    def __init__(self, root: Path, originals: dict[int, Path], found: Verification) -> None:
        super().__init__(root, 0, 0)
        self.originals, self.found = originals, found

    def save(self, step: int, snapshot: Snapshot) -> Path:
        folder = self.originals.get(step)
        if folder is None:
            return self.root
        self.found.checkpoints.append(folder.name)
        for what, file, tensors in (
            ("weights", MODEL, snapshot.model),
            ("optimiser tensors", OPTIMIZER, snapshot.optimizer),
        ):
            self.found.add(what, *_compare_tensors(step, file, read_tensors(folder / file), on_host(tensors)))
        saved, now = (_order_alone(state) for state in (read_state(folder), json.loads(json.dumps(snapshot.state))))
        names = [name for name in STATE if name in saved]
        differences = [(step, f"{name} of state.json") for name in names if saved[name] != now[name]]
        self.found.add("parts of the state", len(names), differences)
        return folder


class _Watch(SignalGuard):
    """Asks for a checkpoint at the steps that have one, and for a stop at the end."""

    def __init__(self, originals: Collection[int], end: int, progress: Callable[[], int]) -> None:
        super().__init__()
        self.originals, self.end, self.progress = originals, end, progress

    def take_checkpoint_request(self) -> bool:
        step = self.progress()
        if step == self.end:
            self.stop = signal.SIGTERM
        return step in self.originals


def verify_run(run_dir: str | Path, *, steps: int | None = None, say: Say = lambda line: None) -> Verification | None:
    """Take the steps up to a run's newest checkpoint again and compare; nothing in the run folder changes.

    A run of several processes needs as many again, started by torchrun.

    Args:
        run_dir: The run folder; no trainer may be in it.
        steps: Take at least so many again; None: those since the checkpoint before the newest.
        say: Takes lines for the user.

    Returns:
        What was compared; None in every process but the first.

    Raises:
        ConfigError: A trainer is in the folder, or the config cannot be used here.
        CheckpointError: A checkpoint is damaged, or the steps between cannot be repeated, with the reason.
        DataError: The data cannot be read.
        ArgumentError: ``run_dir`` is no path, or ``steps`` is below 1.
    """
    run_dir = file_path("run_dir", run_dir)
    steps = None if steps is None else whole_number("steps", steps, least=1)
    if not run_dir.is_dir():
        raise CheckpointError(f"{run_dir}: no such folder; expected a run folder such as runs/embbert")
    with memory_told(), ExitStack() as stack:
        folder = RunFolder(run_dir)
        present = CheckpointStore(folder.checkpoints, 0, 0).complete()
        if not present:
            raise CheckpointError(f"{run_dir}: holds no checkpoint to verify")
        made_with = config_from_dict(read_config(present[-1]), str(present[-1]))
        team, own = stack.enter_context(joined(made_with.training))
        team.leader_says(lambda: stack.enter_context(folder) and None)
        start, originals = team.leader_says(lambda: choose(CheckpointStore(folder.checkpoints, 0, 0), folder, steps))
        last = originals[max(originals)]
        config, state = config_from_dict(read_config(last), str(last)), read_state(last)
        begun = 0 if start is None else read_state(start)["step"]
        found = Verification(start=None if start is None else start.name, steps=state["step"] - begun)
        found.notes = _notes(state)
        team.leader_says(lambda: require_repeatable(folder, start, originals, team.size))
        parts = team.leader_says(lambda: parts_of(folder, begun, state["step"]))
        here = {"num_threads": state["num_threads"], "report_to": (), "device": own.device, "prefer_local_cache": True}
        training = config.training.model_copy(update=here)
        config = config.model_copy(update={"training": training})
        device = stack.enter_context(prepared(training))
        say = say if team.leads else lambda line: None
        revisions = revisions_of(last)
        given = {"revisions": revisions, "resumed": state["data"]}
        data = team.in_turn(lambda: build_data(training, config.model.vocab_size, say, **given))
        data.share = Share(team.rank, team.size)
        hashes = {"tokenizer_sha256": data.tokenizer_sha256, "data_fingerprint": data.fingerprint_as_in(state["data"])}
        check_match(last, config, **hashes)
        plan = make_plan(training, data.rows_per_epoch)
        model = build_model(config.model)
        model.head.start_from(torch.from_numpy(data.unigram_counts))
        model.recompute_layers(training.gradient_checkpointing)
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ultrazoo-verify-")))
        store = TeamStore(_Again(scratch / "checkpoints", originals, found), team)
        display = PlainDisplay(Console(file=StringIO()), None)
        trainer = Trainer(config, model.to(device), data, plan, store, display, team, revisions)
        if start is not None:
            trainer.restore(start)
        say(f"taking steps {begun + 1:,} to {state['step']:,} again, from {start or 'the beginning'}")
        with closing(JsonLines(scratch / "metrics.jsonl")) as reporter:
            trainer.reporters.append(reporter)
            for part in parts:
                _take(part, trainer, originals)
        if not team.leads:
            return None
        made = lines_behind(read_lines(folder.metrics), state, folder.metrics, say)
        before = [] if start is None else lines_behind(made, read_state(start), folder.metrics, say)
        again = scratch / "metrics.jsonl"
        both = ((made[len(before) :], folder.metrics), (read_lines(again), again))
        records = [_untimed(parse_records(lines, path, say), begun) for lines, path in both]
        found.add("records", len(records[0]), _compare_records(*records))
    return found


def _take(part: Part, trainer: Trainer, originals: Collection[int]) -> None:
    """Take the steps of one start again, with the plan and the records that it had."""
    training = trainer.training.model_copy(update=part.plan)
    trainer.training, trainer.plan = training, make_plan(training, trainer.data.rows_per_epoch)
    with suppress(StoppedError):
        trainer.run(_Watch(originals, part.end, lambda: trainer.progress.step))


def _notes(state: dict[str, Any]) -> list[str]:
    """Why a difference would be no surprise."""
    pairs = (("ultrazoo", ultrazoo.__version__), ("torch", torch.__version__))
    return [f"made with {name} {state.get(name)}, here {now}" for name, now in pairs if state.get(name) != now]


def _compare_tensors(
    step: int, file: str, saved: dict[str, torch.Tensor], now: dict[str, torch.Tensor]
) -> tuple[int, Differences]:
    """Compare tensors by their bytes, in the order of the model."""
    differences = []
    for name in [*(name for name in now if name in saved), *sorted(saved.keys() ^ now.keys())]:
        if name not in saved or name not in now:
            text = f"is only in the {'checkpoint' if name in saved else 'replay'}"
        elif (saved[name].shape, saved[name].dtype) != (now[name].shape, now[name].dtype):
            text = "has another shape or dtype"
        elif not torch.equal(saved[name].reshape(-1).view(torch.uint8), now[name].reshape(-1).view(torch.uint8)):
            text = f"differs by up to {(saved[name].double() - now[name].double()).abs().max().item():.3g}"
        else:
            continue
        differences.append((step, f"{file}: {name} {text}"))
    return len(saved), differences


def _untimed(records: list[tuple[bytes, Record]], begun: int) -> list[Record]:
    """Records of the steps after ``begun``, without what no two runs share."""
    later = [record for _, record in records if record["step"] > begun]
    return [{name: value for name, value in record.items() if name not in TIMED} for record in later]


def _compare_records(saved: list[dict[str, Any]], now: list[dict[str, Any]]) -> Differences:
    """Records of the run that did not come again; a validation that a signal cut short may come in addition."""
    differences: Differences = []
    for record in (record for record in saved if record not in now):
        alike = [other for other in now if (other["step"], other.keys()) == (record["step"], record.keys())]
        changed = [name for name in record if alike and alike[0][name] != record[name]]
        text = f"{changed[0]} was {record[changed[0]]}, is {alike[0][changed[0]]}" if changed else "a record is missing"
        differences.append((record["step"], f"metrics.jsonl: {text}"))
    return differences
