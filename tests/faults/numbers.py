"""Numbers that go wrong: NaN in a loss, a gradient, a weight or the optimiser; float16 that overflows; YAML."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

from faults.parts import STEPS, Bench, checkpoints, dies_before, expect_equal, expect_whole, last_step, records, sets
from faults.process import Hook, check, cli
from faults.registry import Came, fault

NOT_FINITE = 3


def poisons(*steps: int) -> Hook:
    """Loss and gradients of these steps become NaN, once each."""

    def plant() -> None:
        from ultrazoo.train.loop import Trainer

        backward, left = Trainer._backward, set(steps)

        def poisoned(self: Any, *arguments: Any) -> None:
            backward(self, *arguments)
            if self.progress.step in left:
                left.discard(self.progress.step)
                self._loss = self._loss * math.nan
                for _, parameter in self.parameters:
                    parameter.grad.mul_(math.nan)

        Trainer._backward = poisoned  # type: ignore[method-assign]

    return plant


def finite(run: Path) -> None:
    """Fail unless every number of every checkpoint is finite."""
    from safetensors.numpy import load_file

    for path in expect_whole(run):
        for name in ("model.safetensors", "optimizer.safetensors"):
            tensors = load_file(path / name)
            bad = [key for key, value in tensors.items() if not bool(abs(value).max() < math.inf)]
            check(not bad, f"{path.name}: {bad} hold NaN")


@fault("27", "NaN in loss and gradients, once and several times in a row", quick=True)
def nan_loss(bench: Bench, folder: Path) -> Came:
    bench.train(folder, hook=poisons(14)).wait().expect(NOT_FINITE, "step 14: loss nan", "step-000012")
    finite(folder / "run")
    bench.resume(folder).wait().expect(0)
    bench.expect_straight(folder / "run")
    skip, limit = sets(on_nan="skip"), sets(on_nan="skip", nan_limit=3)
    bench.train(folder, "skip", *skip, hook=poisons(14)).wait().expect(0, "warning")
    finite(folder / "skip")
    state = json.loads((checkpoints(folder / "skip")[-1] / "state.json").read_text())
    check(state["progress"]["skipped_steps"] == 1, f"skipped {state['progress']['skipped_steps']}")
    bench.train(folder, "row", *limit, hook=poisons(13, 14, 15)).wait().expect(NOT_FINITE, "3 steps in a row")
    finite(folder / "row")
    back = bench.train(folder, "back", *sets(on_nan="rollback"), hook=poisons(14)).wait().expect(0, "going back to")
    finite(folder / "back")
    check(last_step(folder / "back") == STEPS and "step-000012" in back.err, "did not go on from step 12")
    losses = [record["loss"] for name in ("skip", "back") for record in records(folder / name) if "loss" in record]
    check(all(loss is None or math.isfinite(loss) for loss in losses), "a loss that is not finite")
    return Came(
        "stop: exit 3 before the update, resumed equal to the bit; skip: 1 update left out and counted, 3 in a row end "
        "the run; rollback: back to step 12 and on with later data; nothing not finite was ever saved",
        "stop: nothing; skip: 1 update; rollback: 2 steps",
    )


@fault("28", "NaN in a weight or in the optimiser's state", quick=True)
def nan_state(bench: Bench, folder: Path) -> Came:
    def spoils(what: str) -> Hook:
        def plant() -> None:
            from ultrazoo.train.loop import Trainer

            save = Trainer.save

            def spoilt(self: Any) -> None:
                if self.progress.step == 12:
                    parameter = self.parameters[3][1]
                    target = parameter.data if what == "weight" else self.optimizer.state[parameter]["exp_avg"]
                    target.view(-1)[0] = math.nan
                save(self)

            Trainer.save = spoilt  # type: ignore[method-assign]

        return plant

    for what in ("weight", "optimizer"):
        bench.train(folder, what, hook=spoils(what)).wait().expect(NOT_FINITE, "holds values that are not finite")
        kept = [path.name for path in checkpoints(folder / what)]
        check(kept == ["step-000004", "step-000008"], f"kept {kept}")
        finite(folder / what)
        bench.resume(folder, what).wait().expect(0)
        bench.expect_straight(folder / what)
    return Came(
        "the save is refused and names the tensor; exit 3; the last finite checkpoint resumed, equal",
        "4 steps taken again",
    )


@fault("29", "float16 overflows at many steps, then at every step; resume with the scaler")
def overflow(bench: Bench, folder: Path) -> Came:
    def halved(scale: float, then: Hook | None = None) -> Hook:
        def plant() -> None:
            import torch

            from ultrazoo.train import loop
            from ultrazoo.train.amp import Precision

            def make(device: Any, use_amp: bool) -> Precision:
                made = Precision(device, torch.float16)
                made.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=5)
                return made

            loop.make_precision = make
            if then is not None:
                then()

        return plant

    bench.train(folder, "unbroken", hook=halved(2.0**40)).wait().expect(0)
    bench.train(folder, "run", hook=halved(2.0**40, dies_before(14))).wait().expect(-signal.SIGKILL)
    bench.resume(folder, "run", hook=halved(2.0)).wait().expect(0)
    expect_equal(folder / "unbroken", folder / "run")
    state = json.loads((checkpoints(folder / "run")[-1] / "state.json").read_text())
    scale = state["scaler"]["scale"]
    check(1 < scale < 2.0**39, f"the scale is {scale}")
    storm = bench.train(folder, "storm", hook=halved(16.0, poisons(*range(1, 30)))).wait()
    storm.expect(NOT_FINITE)
    check(not checkpoints(folder / "storm") or finite(folder / "storm") is None, "saved")
    return Came(
        f"the scale fell from 2^40 to 2^{math.log2(scale):.0f} over skipped updates and came back with the resume, "
        "equal to the bit; a storm without end: exit 3 with advice",
        "the updates that overflowed",
    )


@fault("31", "YAML: tags, duplicate keys, 1e-4, no, 010, unknown keys, wrong types", quick=True)
def yaml(bench: Bench, folder: Path) -> Came:
    cases = {
        "training:\n  seed: !!python/object/apply:os.system ['touch harm']\n": (2, "no tags"),
        "training:\n  seed: 1\n  seed: 2\n": (2, "appears twice"),
        "training:\n  sed: 1\n": (2, "did you mean 'seed'?"),
        "training:\n  batch_size: many\n": (2, "training.batch_size: got 'many'"),
        "training:\n  batch_size: -1\n": (2, "training.batch_size: got -1"),
        "training:\n  num_epochs: no\n": (2, "training.num_epochs: got 'no'"),
        "training: [1]\n": (2, "training"),
        "model:\n  layer_pattern: [retnt]\n": (2, "did you mean 'retnet'?"),
        "a: b: c\n": (2, "expected plain YAML"),
        "\x00": (2, "expected plain YAML"),
        "training:\n  learning_rate: 1e-4\n  seed: 010\n": (0, "learning_rate: 0.0001"),
    }
    for number, (text, (code, words)) in enumerate(cases.items()):
        path = folder / f"{number}.yaml"
        path.write_text(text)
        cli(folder, "train", path.name, "--print-config").wait().expect(code, words)
    check(not (folder / "harm").exists(), "a tag was carried out")
    last = cli(folder, "train", "10.yaml", "--print-config").wait().out
    check("seed: 10 " in last, "010 is not ten")
    return Came(
        f"{len(cases) - 1} files refused with place and hint (exit 2), no tag carried out; 1e-4 is a number, 010 is 10",
        "nothing",
    )
