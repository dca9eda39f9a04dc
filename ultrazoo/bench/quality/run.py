"""Trains each mixer on each task over the same learning rates and measures how far it stays from the optimum."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn import functional as F

from ultrazoo.bench.gate import require_parity
from ultrazoo.bench.machine import Machine
from ultrazoo.bench.quality.encoder import fit
from ultrazoo.bench.quality.rows import QualityRow, Settings
from ultrazoo.bench.quality.tasks import Examples, Floats, Task
from ultrazoo.bench.timing import Clock
from ultrazoo.config import ModelConfig, TrainingConfig, block_config
from ultrazoo.errors import ConfigError
from ultrazoo.model import IGNORED, MaskedLM, build_model
from ultrazoo.registry import registry
from ultrazoo.spec import BlockSpec
from ultrazoo.train.optim import build_optimizer
from ultrazoo.train.schedule import make_plan

EVALUATE, CHOOSE, TRAIN = 0, 1, 2
"""First numbers of the streams of rows: the fixed evaluation set, the rows that choose the learning rate, training."""
EVALUATION_ROWS, CHOOSING_ROWS = 512, 128
SOLVED = 0.005
"""Nats of excess at which no further learning rate is tried."""


@dataclass(frozen=True)
class Score:
    """A predictor held to the exact posterior; nats per target."""

    accuracy: float
    best_accuracy: float
    loss: float
    floor: float
    excess: float


@dataclass
class Trained:
    """One training run."""

    model: MaskedLM
    steps: int
    seconds: float
    finite: bool


@dataclass
class QualityBench:
    """A run over mixers, tasks and seeds.

    Args:
        settings: What is the same for every mixer.
        device: Where to train.
        machine: Goes into every row.
        clock: Returns seconds.
        say: Takes a line about the run.
        progress: Takes what is being trained.
        keep: Takes each row as it ends.
    """

    settings: Settings
    device: torch.device
    machine: Machine
    clock: Clock = time.perf_counter
    say: Callable[[str], None] = print
    progress: Callable[[str], None] = lambda text: None
    keep: Callable[[QualityRow], None] = lambda row: None
    rows: list[QualityRow] = field(default_factory=list)

    def run(
        self,
        specs: Sequence[BlockSpec],
        tasks: Sequence[Task],
        seeds: Sequence[int],
        kept: Iterable[QualityRow] = (),
        *,
        strict: bool = True,
    ) -> None:
        """Hold the mixers' ops to their references, then train and measure every mixer on every task from every seed.

        Args:
            specs: Mixers.
            tasks: Tasks.
            seeds: Of initial weights and training rows; the evaluation set is the same for all.
            kept: Rows of an earlier run, taken over where they are of the same settings.
            strict: Otherwise a mixer that cannot be built at the size is left out with a line.

        Raises:
            ConfigError: A block cannot be built at the size.
            ParityError: An op does not compute what its reference computes.
        """
        models = self._fitted(specs, tasks, strict)
        found = {row.key: row for row in kept}
        wanted = [
            (spec, task, seed, found.get((spec.name, task.name, seed, str(self.device), self.settings)))
            for spec in specs
            for task in tasks
            for seed in seeds
            if (spec.name, task.name) in models
        ]
        names = dict.fromkeys(op for spec, _, _, row in wanted if row is None for op in spec.ops)
        require_parity([registry().op(name) for name in names], self.device, torch.float32, self.say)
        for spec, task, seed, row in wanted:
            if row is None:
                row = self._row(spec, task, seed, *models[spec.name, task.name])
                self.keep(row)
            self.rows.append(row)

    def _fitted(
        self, specs: Sequence[BlockSpec], tasks: Sequence[Task], strict: bool
    ) -> dict[tuple[str, str], tuple[ModelConfig, int]]:
        models: dict[tuple[str, str], tuple[ModelConfig, int]] = {}
        shape = self.settings.size, self.settings.layers
        for spec in specs:
            try:
                models |= {(spec.name, task.name): fit(spec, task.vocab_size, *shape) for task in tasks}
            except ConfigError as error:
                if strict or (spec is specs[-1] and not models):
                    raise
                self.say(f"{spec.name} is left out: {error}")
        return models

    def _row(self, spec: BlockSpec, task: Task, seed: int, config: ModelConfig, parameters: int) -> QualityRow:
        started = self.clock()
        choosing, testing = task.draw(CHOOSING_ROWS, CHOOSE), task.draw(EVALUATION_ROWS, EVALUATE)
        tried: dict[str, float | None] = {}
        best: tuple[float, float, Trained] | None = None
        last: Trained | None = None
        for rate in self.settings.rates:
            self.progress(f"{spec.name} {task.name} seed {seed} at learning rate {rate:g}")
            last = self._train(task, config, seed, rate)
            excess = self._evaluate(last.model, task, choosing).excess if last.finite else math.inf
            tried[f"{rate:g}"] = excess if math.isfinite(excess) else None
            if math.isfinite(excess) and (best is None or excess < best[0]):
                best = excess, rate, last
            if excess < SOLVED:
                break
        chosen = best[2] if best else last
        score = self._evaluate(best[2].model, task, testing) if best else lost(task, testing)
        state = spec.state_size
        length = testing.tokens.shape[1]
        steps = chosen.steps if chosen else 0
        return QualityRow(
            machine=self.machine,
            name=spec.name,
            task=task.name,
            seed=seed,
            settings=self.settings,
            parameters=parameters,
            hidden_size=config.hidden_size,
            ffn_hidden_size=config.ffn_hidden_size,
            state_size=None if state is None else state(block_config(spec, config)),
            length=length,
            learning_rate=best[1] if best else None,
            tried=tried,
            steps=steps,
            accuracy=score.accuracy,
            best_accuracy=score.best_accuracy,
            loss=score.loss if best else None,
            floor=score.floor,
            excess=score.excess if best else None,
            train_tokens=steps * self.settings.batch * length,
            train_seconds=chosen.seconds if chosen else 0.0,
            seconds=self.clock() - started,
            dtype="float32",
            device=str(self.device),
            threads=self.machine.threads,
            clock=self.machine.clock,
        )

    def _train(self, task: Task, config: ModelConfig, seed: int, rate: float) -> Trained:
        """Fresh rows at every step, AdamW, a tenth of the run warming up, then a cosine to zero."""
        training = TrainingConfig.model_validate(
            {
                "learning_rate": rate,
                "lr_schedule": "cosine",
                "warmup_ratio": 0.1,
                "max_steps": self.settings.steps,
                "max_minutes": self.settings.minutes,
            }
        )
        plan = make_plan(training, None)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            model = build_model(config).to(self.device)
            optimizer, _ = build_optimizer(model, training)
            started, step, seconds = self.clock(), 0, 0.0
            while plan.share(step, seconds, 0.0) < 1:
                for group in optimizer.param_groups:
                    group["lr"] = plan.learning_rate(step, seconds, 0.0)
                tokens, labels = self._tensors(task.draw(self.settings.batch, TRAIN, seed, step))
                output = model(tokens, labels=labels)
                loss = output.loss_sum / output.num_targets + sum(output.losses.values())
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
                finite = math.isfinite(norm.item())  # waits for the device, so that the clock tells the truth
                step, seconds = step + 1, self.clock() - started
                if not finite:
                    return Trained(model, step, seconds, False)
                optimizer.step()
                optimizer.zero_grad()
        return Trained(model, step, seconds, True)

    def _tensors(self, examples: Examples) -> Iterator[torch.Tensor]:
        return (torch.from_numpy(array).to(self.device) for array in (examples.tokens, examples.labels))

    def _evaluate(self, model: MaskedLM, task: Task, examples: Examples) -> Score:
        found = []
        model.eval()
        with torch.no_grad():
            for start in range(0, len(examples.tokens), self.settings.batch):
                part = slice(start, start + self.settings.batch)
                tokens, labels = self._tensors(Examples(examples.tokens[part], examples.labels[part]))
                found.append(F.log_softmax(model(tokens, labels=labels).logits.double(), dim=-1).cpu().numpy())
        model.train()
        return score(np.concatenate(found), task.posterior(examples), examples)


def mixers_named(names: Sequence[str]) -> list[BlockSpec]:
    """Return the mixers of these names, or every one that is installed.

    Raises:
        UnknownNameError: There is none of a name.
    """
    zoo = registry()
    return [zoo.block("mixer", name, "bench quality") for name in dict.fromkeys(names or zoo.mixers())]


def score(log_predicted: Floats, posterior: Floats, examples: Examples) -> Score:
    """Hold predictions to the exact posterior.

    Args:
        log_predicted: (M, V) log-probabilities for each target in reading order.
        posterior: (M, V).
        examples: The rows of these targets.
    """
    targets = examples.labels[examples.labels != IGNORED]
    every = np.arange(len(targets))
    possible = posterior > 0
    log_posterior = np.log(posterior, out=np.zeros_like(posterior), where=possible)
    expected = -(posterior * np.where(possible, log_predicted, 0.0)).sum(1)  # never 0 times infinity
    floor = -(posterior * log_posterior).sum(1)
    return Score(
        accuracy=float(posterior[every, log_predicted.argmax(1)].mean()),
        best_accuracy=float(posterior.max(1).mean()),
        loss=float(-log_predicted[every, targets].mean()),
        floor=float(floor.mean()),
        excess=float((expected - floor).mean()),
    )


def lost(task: Task, examples: Examples) -> Score:
    """The score of a mixer whose every run ended in a loss that is not finite: none of the targets is hit."""
    posterior = task.posterior(examples)
    perfect = score(np.log(np.maximum(posterior, np.finfo(np.float64).tiny)), posterior, examples)
    return Score(0.0, perfect.best_accuracy, math.inf, perfect.floor, math.inf)
