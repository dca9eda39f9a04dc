"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import ultrazoo
from ultrazoo.config import Config
from ultrazoo.errors import DataError
from ultrazoo.model import IGNORED
from ultrazoo.train.amp import make_precision
from ultrazoo.train.checkpoint import Snapshot, load_model, load_optimizer, model_tensors, optimizer_tensors, read_state
from ultrazoo.train.display import Display
from ultrazoo.train.evaluate import evaluate
from ultrazoo.train.health import FiniteGuard, gradient_statistics, require_finite
from ultrazoo.train.metrics import Reporter, Window, plain
from ultrazoo.train.optim import build_optimizer, skips_on_device
from ultrazoo.train.runtime import memory_bytes, rng_state, set_rng_state
from ultrazoo.train.schedule import Plan, Progress
from ultrazoo.train.signals import SignalGuard, StoppedError
from ultrazoo.train.store import CheckpointStore

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
    """

    def __init__(
        self, config: Config, model: nn.Module, data: DataModule, plan: Plan, store: CheckpointStore, display: Display
    ) -> None:
        self.config, self.training = config, config.training
        self.model, self.data, self.plan, self.store, self.display = model, data, plan, store, display
        self.parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names: dict[Tensor, str] = {p: name for name, p in self.parameters}
        self.device = self.parameters[0][1].device
        self.optimizer, summary = build_optimizer(model, self.training)
        display.say(summary)
        self.precision = make_precision(self.device, self.training.use_amp)
        self.finite = FiniteGuard(self.training.nan_check_interval, self.device)
        self.progress, self.window = Progress(), Window()
        self.reporters: list[Reporter] = []
        self.last_checkpoint: Path | None = None
        self._validation: list[Batch] | None = None
        self._batches: Iterator[Batch] = iter(())
        self._loss = self._norm = torch.zeros((), device=self.device)
        self._stats: dict[str, Tensor] = {}
        self._rate = 0.0
        self._mark = (0, 0.0)

    def run(self, guard: SignalGuard) -> None:
        """Take steps to the end of the plan, with records, validations and checkpoints at their intervals.

        Raises:
            StoppedError: A signal asked for it; the checkpoint is written.
        """
        training, progress = self.training, self.progress
        started = time.perf_counter() - progress.elapsed_seconds
        first, begun = self._share(), progress.elapsed_seconds
        self._batches = self.data.train_batches()
        self._mark = (progress.tokens, progress.train_seconds)
        cut_short = progress.step > 0 and progress.validated_step != progress.step
        if cut_short and self._due(training.eval_every_n_steps, first >= 1):
            self.validate(guard)
        last = first >= 1
        while not last and guard.stop is None:
            self.step()
            progress.elapsed_seconds = time.perf_counter() - started
            share = self._share()
            last = share >= 1  # asked once a step: time goes on, and the last step must know that it is
            self.display.advance(progress.step, share)
            if self._due(training.log_every_n_steps, last):
                left = (progress.elapsed_seconds - begun) * max(0.0, 1 - share)
                self._log(share, left / (share - first) if share > first else None)
            if self._due(training.eval_every_n_steps, last):
                self.validate(guard)
            loss = progress.validation_loss
            wanted = guard.take_checkpoint_request() or (loss is not None and self.store.would_be_best(loss))
            if wanted or guard.stop is not None or self._due(training.checkpoint_every_n_steps, last):
                self.save()
            progress.elapsed_seconds = time.perf_counter() - started
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
        self._backward(batches)
        self._update()
        progress.tokens += sum(batch.num_tokens for batch in batches)
        progress.train_seconds += time.perf_counter() - begun

    def _backward(self, batches: list[Batch]) -> None:
        """Leave the gradient of the whole step's mean loss in the parameters."""
        targets = max(1, sum(int((batch.labels != IGNORED).sum()) for batch in batches))
        tokens = max(1, sum(batch.num_tokens for batch in batches))
        sums: dict[str, Tensor] = {}
        for batch in batches:
            moved = batch.to(self.device)
            with self.precision.autocast():
                output = self.model(moved.input_ids, segments=moved.segments, labels=moved.labels)
            weight = batch.num_tokens / tokens
            auxiliary = {name: value * weight for name, value in output.losses.items()}
            objective = output.loss_sum / targets
            for value in auxiliary.values():
                objective = objective + value
            self.precision.backward(objective)
            parts = {"loss_sum": output.loss_sum, **auxiliary, "objective": objective}
            sums = {name: sums.get(name, 0) + value.detach() for name, value in parts.items()}
            self._stats = output.stats
        self._loss = sums.pop("objective")
        self.window.add({"targets": torch.tensor(float(targets), device=self.device), **sums})

    def _update(self) -> None:
        """Clip, and update unless the loss or the norm of the gradient is not finite."""
        step, limit, scaler = self.progress.step, self.training.max_grad_norm, self.precision.scaler
        scaler.unscale_(self.optimizer)
        gradients = [p.grad for _, p in self.parameters if p.grad is not None]
        self._norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if self.training.log_gradient_stats and self._due(self.training.gradient_log_interval):
            self._report({"step": step, "gradients": gradient_statistics(self.parameters)})
        bad = self.finite.look(step, self._loss, torch.zeros_like(self._norm) if self.precision.scaled else self._norm)
        if self.finite.due(step):
            self.finite.check(step, self._loss, self._norm, self.last_checkpoint)
            self.precision.check_scale(step)
        if limit and (self.device.type != "cpu" or self._norm > limit):  # asking a CPU is no sync
            torch._foreach_mul_(gradients, (limit / (self._norm + 1e-6)).clamp(max=1.0))
        if skips_on_device(self.optimizer):
            self.optimizer.found_inf = bad  # type: ignore[attr-defined]
            scaler.step(self.optimizer)
        elif not bad.item():
            scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def validate(self, guard: SignalGuard) -> None:
        """Score the held-out text, unless a signal cuts it short."""
        if self._validation is None:
            self._validation = self.data.validation_batches()[: self.training.eval_max_batches]
        figures = evaluate(self.model, self._validation, self.precision, lambda: guard.stop is not None)
        if figures is None:
            return
        step = self.progress.step
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
            NonFiniteError: A weight, a moment or a step since the last check is not finite; nothing is written.
            CheckpointError: The file system refused.
        """
        step = self.progress.step
        self.finite.check(step, self._loss, self._norm, self.last_checkpoint)
        model, optimizer = model_tensors(self.model), optimizer_tensors(self.optimizer, self.names)
        require_finite({**model, **optimizer}, f"step {step}")
        state = {
            "step": step,
            "epoch": self.data.epoch,
            "validation_loss": self.progress.validation_loss,
            "progress": asdict(self.progress),
            "window": self.window.state_dict(),
            "data": self.data.state_dict(),
            "tokenizer_sha256": self.data.tokenizer_sha256,
            "data_fingerprint": self.data.fingerprint,
            "rng": rng_state(self.device),
            "scaler": self.precision.state_dict(),
            "ultrazoo": ultrazoo.__version__,
            "torch": torch.__version__,
            "device": str(self.device),
            "num_threads": torch.get_num_threads(),
        }
        snapshot = Snapshot(
            model=model,
            optimizer=optimizer,
            state=state,
            config_yaml=self.config.to_yaml(),
            tokenizer_json=self.data.vocabulary.text,
        )
        self.last_checkpoint = self.store.save(step, snapshot)
        self.display.say(f"step {step} checkpoint {self.last_checkpoint}")

    def restore(self, folder: Path) -> None:
        """Continue from a checkpoint that was verified and belongs to this run."""
        state = read_state(folder)
        load_model(folder, self.model)
        load_optimizer(folder, self.optimizer, self.names)
        self.data.load_state_dict(state["data"])
        self.progress = Progress(**state["progress"])
        self.window.load_state_dict(state["window"])
        self.precision.load_state_dict(state["scaler"])
        set_rng_state(state["rng"], self.device)
        self.last_checkpoint = folder
        threads = torch.get_num_threads()
        if state["num_threads"] != threads:
            self.display.say(
                f"resume: {threads} threads, the checkpoint had {state['num_threads']}: the run continues, but to the "
                f"bit only with training.num_threads={state['num_threads']}"
            )

    def result(self, run_dir: Path) -> dict[str, Any]:
        """The figures of the final table."""
        progress, best = self.progress, self.store.best()
        seconds = progress.train_seconds
        return {
            "run_dir": str(run_dir),
            "steps": progress.step,
            "tokens": progress.tokens,
            "seconds": progress.elapsed_seconds,
            "tokens_per_second": progress.tokens / seconds if seconds else None,
            "data_wait_share": progress.wait_seconds / seconds if seconds else None,
            "train_loss": progress.train_loss,
            **{f"validation_{key}": progress.validation.get(key) for key in ("loss", "perplexity", "accuracy")},
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
        progress.train_loss = means["loss"]
        tokens, seconds = progress.tokens - self._mark[0], progress.train_seconds - self._mark[1]
        self._mark = (progress.tokens, progress.train_seconds)
        record: dict[str, Any] = {"step": progress.step, "epoch": self.data.epoch, **means}
        record |= {"lr": self._rate, "grad_norm": self._norm.item(), "tokens": progress.tokens}
        record |= {"tokens_per_second": tokens / seconds if seconds else 0.0, "seconds": progress.elapsed_seconds}
        record |= {"data_wait_share": progress.wait_seconds / max(progress.train_seconds, 1e-9)}
        record |= {"memory_bytes": memory_bytes(self.device)}
        if self._stats:
            record["stats"] = plain(self._stats)
        self._report(record)
        self.display.record(record, share, eta)

    def _report(self, record: dict[str, Any]) -> None:
        for reporter in self.reporters:
            reporter.write(record)
