"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import ultrazoo
from ultrazoo.config import Config
from ultrazoo.errors import DataError, NonFiniteError
from ultrazoo.model import MaskedLM
from ultrazoo.revisions import Revisions, current_revisions
from ultrazoo.train.agree import flight_recorder
from ultrazoo.train.amp import make_precision
from ultrazoo.train.checkpoint import Snapshot, read_state
from ultrazoo.train.compiling import compile_layers
from ultrazoo.train.display import Display
from ultrazoo.train.evaluate import evaluate
from ultrazoo.train.health import FiniteGuard, require_finite
from ultrazoo.train.metrics import Reporter, Window, plain
from ultrazoo.train.objective import accumulate
from ultrazoo.train.optim import build_optimizer, skips_on_device
from ultrazoo.train.receipt import make_receipt
from ultrazoo.train.recovery import Recovery
from ultrazoo.train.runtime import memory_bytes, note_on_threads
from ultrazoo.train.schedule import Plan, Progress
from ultrazoo.train.signals import SignalGuard, StoppedError
from ultrazoo.train.statistics import BlockReport
from ultrazoo.train.store import CheckpointStore
from ultrazoo.train.team import Team, Totals
from ultrazoo.train.watch import Watch

if TYPE_CHECKING:
    from ultrazoo.data import Batch, DataModule


class Trainer:
    """Steps, validations and checkpoints of one run.

    Args:
        config: The whole configuration.
        model: The model, on its device.
        data: The data.
        plan: When the run ends.
        store: Where checkpoints go.
        display: What the user sees.
        team: The processes that train together; None: this one alone.
        revisions: Rules of the run; None: those of a new one.
    """

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        data: DataModule,
        plan: Plan,
        store: CheckpointStore,
        display: Display,
        team: Team | None = None,
        revisions: Revisions | None = None,
    ) -> None:
        self.config, self.training = config, config.training
        self.model, self.data, self.plan, self.store, self.display = model, data, plan, store, display
        self.team = team or Team()
        self.revisions = current_revisions() if revisions is None else revisions
        self.stepped, self.parameters = self.team.take(model)
        self.names: dict[Tensor, str] = {p: name for name, p in self.parameters}
        self.device = self.parameters[0][1].device
        if self.training.compile and isinstance(model, MaskedLM):
            compile_layers(model, config, self.device, self.team)
        self.optimizer, summary = build_optimizer(model, self.training, dict(self.parameters))
        display.say(summary)
        self.precision = make_precision(self.device, self.training.use_amp)
        self.finite = FiniteGuard(self.training.nan_check_interval, self.device)
        self.flights = flight_recorder(self.team, store.root.parent / "flight", config, self.device, self.revisions)
        self.recovery = Recovery(self.training, self.finite, self.flights, store, display.say)
        self.watch = Watch(config.model.top_k_experts)
        self.progress, self.window = Progress(), Window()
        self.reporters: list[Reporter] = []
        self.instead_of_step: Callable[[], None] | None = None
        """Called for each step, and calls ``step`` itself; a profiler puts itself here."""
        self.last_checkpoint: Path | None = None
        self.run_id = ""
        """Of the run and of all that goes on from its checkpoints; drawn where it begins."""
        self._validation: list[Batch] | None = None
        self._batches: Iterator[Batch] = iter(())
        self._loss = self._norm = torch.zeros((), device=self.device)
        self._stats: dict[str, Tensor] = {}
        self._rate = 0.0
        self._warned = False
        self._mark = (0, 0.0)

    def run(self, guard: SignalGuard) -> None:
        """Take steps to the end of the plan, with records, validations and checkpoints at their intervals.

        Raises:
            StoppedError: A signal asked for it; the checkpoint is written.
        """
        guard.begin()
        training, progress = self.training, self.progress
        started = time.perf_counter() - progress.elapsed_seconds
        first, begun = self._share(), progress.elapsed_seconds
        self._batches = self.data.train_batches()
        self._mark = (progress.tokens, progress.train_seconds)
        cut_short = progress.step > 0 and progress.validated_step != progress.step
        if cut_short and self._due(training.eval_every_n_steps, first >= 1):
            self.validate(guard)
        last, compiles = first >= 1, self.training.compile
        while not last and guard.stop is None:
            begins = time.perf_counter()
            (self.instead_of_step or self.step)()
            if compiles:  # torch.compile compiles in the first step of a process, which is not time of the run
                compiles, started = False, started + time.perf_counter() - begins
                self._mark = (progress.tokens, progress.train_seconds)
            guard.poll()
            progress.elapsed_seconds = self.team.clock(time.perf_counter() - started)
            share = self._share()
            last = share >= 1  # asked once a step: time goes on, and the last step must know that it is
            looks = self.finite.due(progress.step) or self._due(training.eval_every_n_steps, last)
            if looks and self.settle():
                last = False
                continue
            self.display.advance(progress.step, share)
            if self._due(training.log_every_n_steps, last):
                left = (progress.elapsed_seconds - begun) * max(0.0, 1 - share)
                self._log(share, left / (share - first) if share > first else None)
            if self._due(training.eval_every_n_steps, last):
                self.validate(guard)
            loss = progress.validation_loss
            wanted = guard.take_checkpoint_request() or (loss is not None and self.store.would_be_best(loss))
            if wanted or guard.stop is not None or self._due(training.checkpoint_every_n_steps, last):
                if self.settle():
                    last = False
                    continue
                self.save()
            progress.elapsed_seconds = self.team.clock(time.perf_counter() - started)
        if guard.stop is not None:
            raise StoppedError(
                guard.stop,
                f"{guard.stop.name}: stopped after step {progress.step}; checkpoint: {self.last_checkpoint or 'none'}; "
                "continue with --resume auto",
            )

    def step(self) -> None:
        """Take one optimiser step over ``gradient_accumulation_steps`` micro-batches, each weighted by its targets."""
        progress = self.progress
        begun = time.perf_counter()
        batches = [self._next_batch() for _ in range(self.training.gradient_accumulation_steps)]
        progress.wait_seconds += time.perf_counter() - begun
        self._rate = self.plan.learning_rate(progress.step, progress.elapsed_seconds, self.data.epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate
        progress.step += 1
        moment = self.flights.begin(progress.step, batches, self._rate)
        totals = self.team.totals(batches)
        self._backward(batches, totals)
        self._update()
        moment.loss, moment.norm = self._loss, self._norm
        progress.tokens += totals.tokens
        progress.train_seconds += time.perf_counter() - begun

    def _backward(self, batches: list[Batch], totals: Totals | None = None) -> None:
        """Leave the gradient of the whole step's mean loss in the parameters."""
        exact = self.training.exact_balance_loss
        sums, self._stats = accumulate(self.stepped, batches, self.precision, self.team, totals, exact_balance=exact)
        self._loss = sums.pop("objective")
        self.window.add(sums)

    def _update(self) -> None:
        """Clip, and update unless this step or one since the last look has a loss or gradient that is not finite."""
        step, limit, scaler = self.progress.step, self.training.max_grad_norm, self.precision.scaler
        scaler.unscale_(self.optimizer)
        gradients = [p.grad for _, p in self.parameters if p.grad is not None]
        self._norm = self.team.norm(gradients)
        reports = self.training.log_gradient_stats and self._due(self.training.gradient_log_interval)
        report = BlockReport(self.model, self.parameters, self.team) if reports else None
        hold = self.finite.mark(step, self._loss, torch.zeros_like(self._norm) if self.precision.scaled else self._norm)
        if self.finite.due(step):
            self.precision.check_scale(step)
        if limit and (self.device.type != "cpu" or self._norm > limit):  # asking a CPU is no sync
            torch._foreach_mul_(gradients, (limit / (self._norm + 1e-6)).clamp(max=1.0))
        if skips_on_device(self.optimizer) and not self.precision.scaled:  # a scaler would write its own found_inf
            self.optimizer.found_inf = hold  # type: ignore[attr-defined]
            scaler.step(self.optimizer)
        elif not hold.item():
            scaler.step(self.optimizer)
        scaler.update()
        if report is not None:
            self._report({"step": step, **report.read()})
        self.optimizer.zero_grad(set_to_none=True)

    def settle(self) -> bool:
        """Act on steps since the last look that were not finite; True if the run went back to a checkpoint.

        Raises:
            NonFiniteError: The run must stop.
        """
        target = self.recovery.look(self.progress, self.model, self.precision, self.last_checkpoint, self._report)
        if target is not None:
            self.progress.return_to(Progress(**self._load(target)["progress"]))
        return target is not None

    def validate(self, guard: SignalGuard) -> None:
        """Score the held-out text, unless a signal cuts it short.

        Raises:
            NonFiniteError: The loss is not finite; ``on_nan`` does not apply, for there is no step to leave out.
        """
        step = self.progress.step
        if self._validation is None:
            self._validation = self.data.validation_batches()[: self.training.eval_max_batches]
        try:
            figures = evaluate(self.model, self._validation, self.precision, guard.poll, self.team)
        except NonFiniteError as error:
            last = self.last_checkpoint or "none"
            raise NonFiniteError(f"step {step}: {error}; last good checkpoint: {last}") from error
        if figures is None:
            if guard.stop is None:
                tokens = sum(batch.num_tokens for batch in self._validation)
                self.display.say(
                    f"warning: step {step}: no validation loss: none of the {tokens:,} held-out tokens is a target; "
                    "raise training.validation_fraction or training.eval_mlm_probability, or add rows"
                )
            return
        self.progress.validation, self.progress.validated_step = figures, step
        named = {f"validation_{name}": value for name, value in figures.items()}
        self._report({"step": step, **named, "unigram_entropy": self.data.unigram_entropy})
        self.display.say(
            f"step {step} validation loss {figures['loss']:.4f} perplexity {figures['perplexity']:,.2f} "
            f"masked accuracy {figures['accuracy']:.2%}"
        )

    def save(self) -> None:
        """Write a checkpoint of this step.

        Raises:
            NonFiniteError: A weight or a moment of the optimiser is not finite; nothing is written.
            CheckpointError: The file system refused.
            UltrazooError: It refused the records that the checkpoint stands behind.
        """
        step = self.progress.step
        model = self.team.model_tensors(self.model)
        optimizer = self.team.optimizer_tensors(self.optimizer, self.names)
        self.team.leader_says(lambda: require_finite({**model, **optimizer}, f"step {step}"))
        state = {
            "run": self.run_id,
            "revisions": dict(self.revisions),
            "step": step,
            "epoch": self.data.epoch,
            "validation_loss": self.progress.validation_loss,
            "progress": asdict(self.progress),
            "window": self.window.state_dict(),
            **self.team.leader_says(self._sync),
            "watch": self.watch.state_dict(),
            "finite": self.finite.state_dict(),
            "data": self.data.state_dict(),
            "tokenizer_sha256": self.data.tokenizer_sha256,
            "data_fingerprint": self.data.fingerprint,
            **self.team.random_states(self.device),
            "processes": self.team.size,
            "scaler": self.precision.state_dict(),
            "ultrazoo": ultrazoo.__version__,
            "torch": torch.__version__,
            "device": str(self.device),
            "num_threads": torch.get_num_threads(),
        }
        yaml, tokenizer = self.config.to_yaml(), self.data.vocabulary.text
        tensors = {"model": model, "optimizer": optimizer}
        receipt = make_receipt(self.config, self.device, self.data, self.progress)
        snapshot = Snapshot(**tensors, state=state, config_yaml=yaml, tokenizer_json=tokenizer, receipt=receipt)
        self.last_checkpoint = self.store.save(step, snapshot)
        self.recovery.returns = 0
        self.display.say(f"step {step} checkpoint {self.last_checkpoint}")

    def restore(self, folder: Path) -> None:
        """Continue from a checkpoint that was verified and belongs to this run."""
        state = self._load(folder)
        self.data.load_state_dict(state["data"])
        self.progress = Progress(**state["progress"])
        self.finite.load_state_dict(state.get("finite", {}))
        self.run_id = state.get("run", self.run_id)
        notes = self.team.set_random_states(state, self.device), note_on_threads(state["num_threads"])
        for note in filter(None, notes):
            self.display.say(note)

    def _load(self, folder: Path) -> dict[str, Any]:
        """Take over weights, optimiser and what belongs to them; return the state of everything else."""
        state = read_state(folder)
        self.team.load_model(folder, self.model)
        self.team.load_optimizer(folder, self.optimizer, self.names)
        self.window.load_state_dict(state["window"])
        self.watch.load_state_dict(state.get("watch", {}))
        self.precision.load_state_dict(state["scaler"])
        self.last_checkpoint = folder
        return state

    def result(self, run_dir: Path) -> dict[str, Any]:
        """The figures of the final table."""
        best = self.store.best()
        return {
            "run_dir": str(run_dir),
            **self.progress.figures(),
            "unigram_entropy": self.data.unigram_entropy,
            "checkpoint": str(self.last_checkpoint) if self.last_checkpoint else None,
            "best_checkpoint": str(best[0]) if best and self.store.num_best else None,
        }

    def _share(self) -> float:
        return self.plan.share(self.progress.step, self.progress.elapsed_seconds, self.data.epoch)

    def _due(self, interval: int, last: bool = False) -> bool:
        return last or self.progress.step % interval == 0

    def _next_batch(self) -> Batch:
        batch = next(self._batches, None)
        if batch is None:
            raise DataError("training data: ended before the run did; expected batches without end")
        return batch

    def _log(self, share: float, eta: float | None) -> None:
        progress = self.progress
        means = self.window.means()
        if math.isfinite(means["loss"]):
            progress.train_loss = means["loss"]
        tokens, seconds = progress.tokens - self._mark[0], progress.train_seconds - self._mark[1]
        self._mark = (progress.tokens, progress.train_seconds)
        record: dict[str, Any] = {"step": progress.step, "epoch": self.data.epoch, **means}
        if not self.window.losses:
            record["loss"] = None
            self._warn_of_no_targets()
        record |= {"lr": self._rate, "grad_norm": self._norm.item(), "tokens": progress.tokens}
        record |= {"tokens_per_second": tokens / seconds if seconds else 0.0, "seconds": progress.elapsed_seconds}
        record |= {"data_wait_share": progress.wait_seconds / max(progress.train_seconds, 1e-9)}
        record |= {"memory_bytes": memory_bytes(self.device), "skipped_steps": progress.skipped_steps}
        if self._stats:
            record["stats"] = plain(self._stats)
        self._report(record)
        self.display.record(record, share, eta)
        for line, symptom in self.watch.look(progress.step, self.window.losses, record.get("stats", {})):
            self.display.say(f"warning: {line}")
            self._report({"step": progress.step, **symptom})

    def _warn_of_no_targets(self) -> None:
        """Say once per process what a record without a target means."""
        if not self._warned:
            self._warned = True
            self.display.say(
                f"warning: step {self.progress.step}: no training loss: none of the tokens since the last record is a "
                "target; raise training.mlm_probability, training.batch_size or training.log_every_n_steps"
            )

    def _report(self, record: dict[str, Any]) -> None:
        for reporter in self.reporters:
            reporter.write(record)

    def _sync(self) -> dict[str, Any]:
        """Wait until the records so far are on the disk; return what the state of a checkpoint says of them."""
        return {name: value for reporter in self.reporters for name, value in reporter.sync().items()}
