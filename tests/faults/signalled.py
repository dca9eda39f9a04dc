"""Signals: wherever they come, a checkpoint and the documented exit code; the second one ends the process at once."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from faults.parts import Bench, checkpoints, expect_whole, last_step, leftovers, sets, slow_disk
from faults.process import check, cli, executed
from faults.registry import Came, fault
from faults.texts_read import children


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@fault("12", "SIGTERM in a step, with worker processes")
def terminated(bench: Bench, folder: Path) -> Came:
    more = sets(dataloader_workers=2)
    slowly = sets(max_steps=100_000)
    process = executed(folder, "train", bench.config, "--output-dir", "run", *more, *slowly)
    process.until(lambda: last_step(folder / "run") >= 5 and len(children(process.pid)) == 2)
    workers = children(process.pid)
    begun = time.monotonic()
    os.killpg(process.pid, signal.SIGTERM)  # as a scheduler does: to the workers as well
    process.wait().expect(143, "SIGTERM: stopped after step", "continue with --resume auto")
    seconds = time.monotonic() - begun
    time.sleep(0.2)
    check(not any(map(alive, workers)), "workers outlived the run")
    newest = int(expect_whole(folder / "run")[-1].name.removeprefix("step-"))
    check(newest == last_step(folder / "run"), f"checkpoint {newest}, last step {last_step(folder / 'run')}")
    bench.resume(folder, "run", *more, *sets(max_steps=newest + 1)).wait().expect(0)
    return Came(
        f"finished the step, wrote the checkpoint, exit 143 after {seconds:.1f} s; workers gone; resumed", "nothing"
    )


@fault("13", "SIGTERM in the first batch, a validation, a save; SIGINT; SIGUSR1")
def at_other_moments(bench: Bench, folder: Path) -> Came:
    def signals(place: str, number: signal.Signals, nth: int) -> Any:
        def plant() -> None:
            from ultrazoo.train import loop, store

            owner, name = {
                "first batch": (loop.Trainer, "_next_batch"),
                "validation": (loop, "evaluate"),
                "save": (store, "write_checkpoint"),
            }[place]
            real, count = getattr(owner, name), [0]

            def call(*arguments: Any) -> Any:
                count[0] += 1
                if count[0] == nth:
                    os.kill(os.getpid(), number)
                return real(*arguments)

            setattr(owner, name, call)

        return plant

    told = []
    for place, number, nth in (
        ("first batch", signal.SIGTERM, 1),
        ("validation", signal.SIGTERM, 2),
        ("save", signal.SIGTERM, 2),
        ("save", signal.SIGINT, 3),
    ):
        run = f"{place}-{number.name}".replace(" ", "-")
        bench.train(folder, run, hook=signals(place, number, nth)).wait().expect(128 + number, "stopped after step")
        kept = expect_whole(folder / run)
        check(
            kept and int(kept[-1].name.removeprefix("step-")) == last_step(folder / run),
            "no checkpoint of the last step",
        )
        bench.resume(folder, run).wait().expect(0)
        bench.expect_straight(folder / run)
        told.append(f"{place} ({number.name}, exit {128 + number})")
    asked = signals("first batch", signal.SIGUSR1, 5)
    bench.train(folder, "asked", *sets(max_rolling_checkpoints=99), hook=asked).wait().expect(0)
    check((folder / "asked/checkpoints/step-000003").is_dir(), "SIGUSR1 left no checkpoint")
    bench.expect_straight(folder / "asked")
    return Came(
        f"{', '.join(told)}: checkpoint of the last step, resumed equal to the bit; SIGUSR1: a checkpoint and "
        "on, equal",
        "nothing",
    )


@fault("14", "a second SIGINT or SIGTERM in a save", quick=True)
def twice(bench: Bench, folder: Path) -> Came:
    waited = []
    for first, second in ((signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)):
        run = folder / first.name
        process = bench.train(folder, run.name, hook=slow_disk(0.3))
        process.until(lambda run=run: any(".tmp-" in name for name in leftovers(run) if name.startswith(".step")))
        process.send(first)
        process.until(lambda process=process: "once more to stop at once" in process.said())
        begun = time.monotonic()
        process.send(second)
        process.wait().expect(128 + second, "stopped at once")
        waited.append(time.monotonic() - begun)
        expect_whole(run)
        bench.resume(folder, run.name).wait().expect(0)
        bench.expect_straight(run)
    check(max(waited) < 1, f"took {max(waited):.1f} s")
    return Came(
        f"ended {max(waited) * 1000:.0f} ms later with 128 + its number; nothing torn was taken for a checkpoint; "
        "resumed, equal",
        "the steps since the last checkpoint",
    )


@fault("13b", "SIGUSR1 and SIGTERM before the first step")
def before_the_first_step(bench: Bench, folder: Path) -> Came:
    def plant() -> None:
        from ultrazoo.train import run

        real = run.build_data

        def build(*arguments: Any) -> Any:
            os.kill(os.getpid(), signal.SIGUSR1)
            return real(*arguments)

        run.build_data = build

    bench.train(folder, hook=plant).wait().expect(0, "nothing to save")
    bench.expect_straight(folder / "run")

    def stop() -> None:
        from ultrazoo.train import run

        run.build_data = lambda *_: os.kill(os.getpid(), signal.SIGTERM)  # type: ignore[assignment]

    ended = cli(folder, "train", bench.config, "--output-dir", "early", hook=stop).wait()
    check(ended.code in (-signal.SIGTERM, 143), f"exit code {ended.code}")
    bench.resume(folder, "early").wait().expect(0)
    bench.expect_straight(folder / "early")
    check(len(checkpoints(folder / "early")) > 0, "no checkpoint")
    return Came(
        "SIGUSR1 is answered, not fatal; SIGTERM ends it as there is nothing to save yet; begun again, equal", "nothing"
    )
