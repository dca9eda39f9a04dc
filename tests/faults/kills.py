"""Kills: at any moment, inside a checkpoint's writing, between its publication and the removal of older ones."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

from faults.parts import (
    STEPS,
    Bench,
    checkpoints,
    dies_before,
    expect_equal,
    expect_whole,
    last_step,
    leftovers,
    sets,
    slow_disk,
)
from faults.process import Hook, check
from faults.registry import Came, fault

KILLS = int(os.environ.get("ULTRAZOO_FAULT_KILLS", "50"))
MANY = {"max_steps": 300, "checkpoint_every_n_steps": 2, "eval_every_n_steps": 20, "eval_max_batches": 2}


def kill_at_random(bench: Bench, folder: Path, count: int, seed: int, *options: str) -> Came:
    """Kill a run ``count`` times, let it end, and compare it with the unbroken one."""
    chance = random.Random(seed)
    settings = [*sets(**MANY), *options]
    bench.train(folder, "unbroken", *settings).wait(300).expect(0)
    where: Counter[str] = Counter()
    again, furthest, runs = 0, 0, 0
    run = folder / "run-0"
    for _ in range(count):
        process = bench.resume(folder, run.name, *settings, hook=slow_disk(0.015))
        ended = False
        if chance.random() < 0.15:  # while the process starts
            time.sleep(chance.uniform(0.0, 1.0))
        else:  # after some checkpoints of its own, so that the run comes forward, at any moment of what follows
            complete = chance.randint(0, 6)
            while process.said().count(" checkpoint ") < complete and not ended:
                ended = process.poll() is not None
                time.sleep(0.002)
            time.sleep(chance.uniform(0.0, 0.6))
        if ended or process.poll() is not None:
            runs += 1
            expect_equal(folder / "unbroken", run)
            run = folder / f"run-{runs}"
            where["after the end of a run"] += 1
            continue
        process.send(signal.SIGKILL)
        process.wait()
        left = leftovers(run)
        kept = checkpoints(run)
        if any(".tmp-" in name for name in left):
            where["while a file or checkpoint was written"] += 1
        elif any(name.endswith(".deleting") for name in left):
            where["while older checkpoints were removed"] += 1
        else:
            where["between"] += 1
        expect_whole(run)
        furthest = max(furthest, last_step(run))
        again += max(0, last_step(run) - (int(kept[-1].name.removeprefix("step-")) if kept else 0))
    bench.resume(folder, run.name, *settings).wait(300).expect(0)
    expect_equal(folder / "unbroken", run)
    moments = ", ".join(f"{number} {name}" for name, number in where.most_common())
    return Came(
        f"{count} kills at random moments of steps 1 to {furthest} ({moments}); each resume went on by itself, and the "
        "end is equal to the bit",
        f"{again} steps taken again in all; no checkpoint, no sample",
    )


@fault("1a", "kill -9 at random moments (packing, dropout, accumulation)", limit=420)
def kill_plain(bench: Bench, folder: Path) -> Came:
    return kill_at_random(bench, folder, (KILLS + 1) // 2, 1)


@fault("1b", "kill -9 at random moments (worker process, bfloat16, MoE, streaming)", limit=420)
def kill_much(bench: Bench, folder: Path) -> Came:
    streamed = ["--set", "training.stream_local_parquet=true", "--set", "training.prefer_local_cache=false"]
    more = ["--set", "training.dataloader_workers=1", "--set", "training.use_amp=true", "--set", "model.use_moe=true"]
    return kill_at_random(bench, folder, KILLS // 2, 2, *streamed, *more)


@fault("1q", "kill -9 at five random moments", quick=True)
def kill_few(bench: Bench, folder: Path) -> Came:
    return kill_at_random(bench, folder, 5, 3, "--set", "training.max_steps=80")


CALLS = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "open")


def dies_at_call(number: int, tell: Path) -> Hook:
    """The process kills itself before the ``number``-th call on the file system of the third checkpoint."""

    def plant() -> None:
        from ultrazoo.train.store import CheckpointStore

        state = {"saves": 0, "calls": 0, "inside": False}

        def counted(name: str, real: Any) -> Any:
            def call(*arguments: Any, **named: Any) -> Any:
                if state["inside"]:
                    state["calls"] += 1
                    if state["calls"] == number:
                        tell.write_text(name)
                        os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **named)

            return call

        for name in CALLS:
            setattr(os, name, counted(name, getattr(os, name)))
        save = CheckpointStore.save

        def watched(self: Any, step: int, snapshot: Any) -> Path:
            state["saves"] += 1
            state["inside"] = state["saves"] == 3
            path = save(self, step, snapshot)
            state["inside"] = False
            return path

        CheckpointStore.save = watched  # type: ignore[method-assign]

    return plant


def every_point(bench: Bench, folder: Path, stride: int) -> Came:
    """Kill before each call that a save makes; some checkpoint must be whole each time, and the run go on."""
    options = sets(max_rolling_checkpoints=1, num_best_checkpoints=0)
    calls: Counter[str] = Counter()
    number = 1
    while True:
        run, told = folder / f"run-{number}", folder / f"told-{number}"
        ended = bench.train(folder, run.name, *options, hook=dies_at_call(number, told)).wait()
        if ended.code == 0:
            check(calls, "no call was met")
            break
        ended.expect(-signal.SIGKILL)
        calls[told.read_text()] += 1
        kept = expect_whole(run)
        check(kept and kept[-1].name >= "step-000008", f"kept only {[path.name for path in kept]}")
        bench.resume(folder, run.name, *options).wait().expect(0)
        bench.expect_straight(run)
        shutil.rmtree(run)
        number += stride
    kinds = ", ".join(f"{count} {call}" for call, count in calls.items())
    return Came(
        f"killed before each of {sum(calls.values())} calls of a save ({kinds}); a whole checkpoint was there each "
        "time, and every run ended equal to the bit",
        "at most the 4 steps since the checkpoint before",
    )


@fault("6", "kill between publication and rotation, and at every other call of a save", limit=420)
def publication(bench: Bench, folder: Path) -> Came:
    return every_point(bench, folder, 1)


@fault("6q", "kill at every ninth call of a save", quick=True)
def publication_quick(bench: Bench, folder: Path) -> Came:
    return every_point(bench, folder, 9)


@fault("30", "kill between two micro-batches of a step", quick=True)
def between_micro_batches(bench: Bench, folder: Path) -> Came:
    def plant() -> None:
        from ultrazoo.train.amp import Precision

        backward, count = Precision.backward, [0]

        def counted(self: Any, objective: Any) -> None:
            count[0] += 1
            if count[0] == 2 * 13:  # the second of two micro-batches of step 13
                os.kill(os.getpid(), signal.SIGKILL)
            backward(self, objective)

        Precision.backward = counted  # type: ignore[method-assign]

    bench.train(folder, hook=plant).wait().expect(-signal.SIGKILL)
    check(last_step(folder / "run") == 12, f"died after step {last_step(folder / 'run')}")
    bench.resume(folder).wait().expect(0)
    bench.expect_straight(folder / "run")
    return Came("resumed at the last whole step with the same micro-batches; equal to the bit", "1 micro-batch of 26")


@fault("23", "resume with another number of workers", quick=True)
def other_workers(bench: Bench, folder: Path) -> Came:
    bench.copy_of_broken(folder)
    bench.resume(folder, "run", *sets(dataloader_workers=2, num_workers=3)).wait().expect(0)
    bench.expect_straight(folder / "run")
    bench.train(folder, "other", *sets(dataloader_workers=2), hook=dies_before(14)).wait().expect(-signal.SIGKILL)
    bench.resume(folder, "other").wait().expect(0)
    bench.expect_straight(folder / "other")
    return Came(
        f"0 workers then 2, and 2 then 0: {STEPS} steps equal to the bit; world size: distributed, other script",
        "nothing",
    )
