"""Faults of what is stored: damaged, missing, foreign and harmful checkpoints, full and closed disks, two trainers."""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from faults.parts import Bench, checkpoints, contents, expect_whole, last_step, leftovers, sets, texts, write_texts
from faults.process import check, cli, executed
from faults.registry import Came, fault


def reseal(folder: Path) -> None:
    """Make a manifest agree with its files, as someone who means harm would."""
    from ultrazoo.train.durable import sha256

    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        manifest["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def falls_back(bench: Bench, folder: Path, say: str) -> Came:
    ended = bench.resume(folder).wait().expect(0, "warning", say, "set aside as step-000012.damaged")
    check((folder / "run/checkpoints/step-000012.damaged").is_dir(), "the damaged one is gone")
    shutil.rmtree(folder / "run/checkpoints/step-000012.damaged")
    bench.expect_straight(folder / "run")
    check("continuing from" in ended.err and "step-000008" in ended.err, "did not go on from step 8")
    return Came("told by the manifest, set aside, resumed from the one before; equal to the bit", "4 steps taken again")


@fault("2", "newest model file cut short", quick=True)
def cut_short(bench: Bench, folder: Path) -> Came:
    path = bench.copy_of_broken(folder) / "checkpoints/step-000012/model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return falls_back(bench, folder, "model.safetensors has")


@fault("3", "one bit flipped in the weights", quick=True)
def bit_flipped(bench: Bench, folder: Path) -> Came:
    path = bench.copy_of_broken(folder) / "checkpoints/step-000012/model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))
    return falls_back(bench, folder, "model.safetensors does not have the SHA-256 of its manifest")


@fault("4", "optimiser, random numbers or data position missing", quick=True)
def state_missing(bench: Bench, folder: Path) -> Came:
    last = bench.copy_of_broken(folder) / "checkpoints/step-000012"
    whole = (last / "state.json").read_text()
    for part in ("rng", "data"):
        state = json.loads(whole)
        del state[part]
        (last / "state.json").write_text(json.dumps(state))
        reseal(last)
        bench.resume(folder).wait().expect(1, f"lacks state.json: {part}", "--weights-only")
    (last / "state.json").write_text(whole)
    reseal(last)
    (last / "optimizer.safetensors").unlink()
    bench.train(folder, "new", "--resume", last).wait().expect(1, "optimizer.safetensors is missing", "--weights-only")
    bench.train(folder, "new", "--resume", last, "--weights-only").wait().expect(0, "weights from")
    falls_back(bench, folder, "optimizer.safetensors is missing")
    return Came(
        "an exact resume is refused and names what is missing; auto falls back; --weights-only begins a new run",
        "nothing by itself; with --weights-only the optimiser's state",
    )


MOUNT = ctypes.CDLL(None, use_errno=True)


def mount(target: Path, size: int, again: bool = False) -> bool:
    """Mount a small disk in memory; False where that is not allowed."""
    flags = 32 if again else 0
    return MOUNT.mount(b"tmpfs", bytes(target), b"tmpfs", flags, f"size={size}".encode()) == 0


@fault("5", "disk full in a save", quick=True)
def disk_full(bench: Bench, folder: Path) -> Came:
    disk = folder / "disk"
    disk.mkdir()
    keep = sets(max_rolling_checkpoints=9)
    size = sum(path.stat().st_size for path in checkpoints(bench.straight)[-1].iterdir())
    if not mount(disk, int(3.4 * size)):
        return _file_limit(bench, folder, size)
    try:
        bench.train(disk, "run", *keep).wait().expect(1, "No space left", "--resume auto")
        kept = expect_whole(disk / "run")
        check(len(kept) >= 2, f"kept {[path.name for path in kept]}")
        check(not leftovers(disk / "run"), f"left behind: {leftovers(disk / 'run')}")
        check(mount(disk, 64 << 20, again=True), "cannot make the disk larger")
        bench.resume(disk, "run", *keep).wait().expect(0)
        bench.expect_straight(disk / "run")
    finally:
        MOUNT.umount2(bytes(disk), 2)
    return Came(
        f"a disk of {3.4 * size / 1e6:.1f} MB filled up: stopped with the reason, {len(kept)} whole checkpoints, "
        "nothing half written; with more room the run went on, equal to the bit",
        "the steps since the last checkpoint",
    )


def _file_limit(bench: Bench, folder: Path, size: int) -> Came:
    """The same without the right to mount: files may grow no larger than a part of a checkpoint."""

    def plant() -> None:
        from ultrazoo.train.loop import Trainer

        save = Trainer.save

        def limited(self: Any) -> None:
            if self.progress.step == 12:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size // 8, size // 8))
            save(self)

        Trainer.save = limited  # type: ignore[method-assign]

    bench.train(folder, hook=plant).wait().expect(1, "cannot be written", "--resume auto")
    kept = expect_whole(folder / "run")
    check(kept and not leftovers(folder / "run"), "left behind")
    bench.resume(folder).wait().expect(0)
    bench.expect_straight(folder / "run")
    return Came(
        "files refused to grow (no right to mount a small disk here): stopped with the reason, earlier checkpoints "
        "whole; then went on, equal to the bit",
        "the steps since the last checkpoint",
    )


def obey_permissions() -> None:
    """Give up root's right to write where permissions forbid it (capability 1, CAP_DAC_OVERRIDE)."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable of the lower half, then of the upper
    libc = ctypes.CDLL(None, use_errno=True)
    check(libc.capget(header, sets) == 0, "capget failed")
    sets[0] &= ~(1 << 1)
    check(libc.capset(header, sets) == 0, "capset failed")


@fault("7", "run folder read-only, not possible, or a file", quick=True)
def no_folder(bench: Bench, folder: Path) -> Came:
    closed = folder / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    (folder / "file").write_text("here")
    seconds = []
    for target, hook in ((closed / "run", obey_permissions), (Path("/proc/none/run"), None), (folder / "file", None)):
        ended = bench.train(folder, target, hook=hook).wait().expect(2, str(target), "--output-dir")
        check("step 1" not in ended.err, "took a step first")
        seconds.append(ended.seconds)
    return Came(f"refused before the first step, in {max(seconds):.1f} s at most, with the path; exit 2", "nothing")


@fault("8", "two trainers in one folder")
def two_trainers(bench: Bench, folder: Path) -> Came:
    first = executed(folder, "train", bench.config, "--output-dir", "run", *sets(max_steps=100_000))
    first.until(lambda: checkpoints(folder / "run"))
    bench.resume(folder).wait().expect(2, "in use by another trainer", str(first.pid))
    first.send(signal.SIGKILL)
    first.wait()
    check((folder / "run/.lock").read_text().strip() == str(first.pid), "no stale lock to recover")
    step = int(checkpoints(folder / "run")[-1].name.removeprefix("step-"))
    bench.resume(folder, "run", *sets(max_steps=step + 2)).wait().expect(0)
    return Came(
        "the second is refused and told the first's pid; after kill -9 of the first, the lock is free", "nothing"
    )


@fault("9", "harmful pickles in place of a checkpoint")
def pickles(bench: Bench, folder: Path) -> Came:
    mark = folder / "harm"

    class Harm:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.system, (f"touch {mark}",)

    harm = pickle.dumps(Harm())
    foreign = folder / "foreign"
    foreign.mkdir()
    for name in (".metadata", "model.pt", "pytorch_model.bin", "optimizer.pt", "rng_state.pth"):
        (foreign / name).write_bytes(harm)
    config, codes = str(bench.config), []
    commands: list[tuple[str, ...]] = [
        ("train", config, "--resume", str(foreign), "--output-dir", "new"),
        ("inspect", str(foreign)),
        ("fill-mask", str(foreign), "the [MASK]"),
    ]
    for name in ("model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json", "manifest.json"):
        last = folder / f"with-{name}"
        shutil.copytree(bench.broken / "checkpoints/step-000012", last)
        (last / name).write_bytes(harm)
        if name != "manifest.json":
            reseal(last)
        commands += [
            ("train", config, "--resume", str(last), "--output-dir", f"new-{name}", *sets(max_steps=13)),
            ("train", config, "--resume", str(last), "--weights-only", "--output-dir", f"weights-{name}"),
            ("inspect", str(last)),
        ]
    for command in commands:
        ended = cli(folder, *command).wait()
        check("Traceback" not in ended.err, f"{command}: {ended.err[-800:]}")
        check(not mark.exists(), f"{command}: the pickle ran")
        codes.append(ended.code)
    check(codes[:3] == [1, 1, 1], f"exit codes {codes}")
    refused = sum(code != 0 for code in codes)
    return Came(
        f"{len(commands)} commands met them; none was unpickled; {refused} refused, the others do not read it",
        "nothing",
    )


@fault("10", "resume with another architecture, vocabulary or format", quick=True)
def another_model(bench: Bench, folder: Path) -> Came:
    run = bench.copy_of_broken(folder)
    before = contents(run)
    wide = bench.resume(folder, "run", "--set", "model.hidden_size=64").wait()
    wide.expect(1, "model.hidden_size: checkpoint 32, this run 64")
    words = bench.resume(folder, "run", "--set", "model.vocab_size=320").wait()
    words.expect(1, "model.vocab_size: checkpoint 300, this run 320", "tokenizer_sha256")
    check(contents(run) == before, "the refusal changed the run folder")
    manifest = run / "checkpoints/step-000012/manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format_version": 2}))
    before = contents(run)
    bench.resume(folder).wait().expect(1, "got format_version 2, expected 1")
    check(contents(run) == before, "the refusal changed the run folder")
    return Came("refused with the keys that differ, old and new value; exit 1; the run folder is unchanged", "nothing")


@fault("11", "tokenizer or data changed since the checkpoint", quick=True)
def another_tokenizer(bench: Bench, folder: Path) -> Came:
    run = bench.copy_of_broken(folder)
    before = contents(run)
    path = folder / "other.json"
    path.write_text((run / "tokenizer.json").read_text() + " ")
    bench.resume(folder, "run", *sets(tokenizer=str(path))).wait().expect(1, "tokenizer_sha256: checkpoint", "this run")
    write_texts(folder / "data/texts.parquet", texts(401))
    changed = sets(local_parquet_dir=str(folder / "data"), tokenizer=str(run / "tokenizer.json"))
    bench.resume(folder, "run", *changed).wait().expect(1, "data_fingerprint: checkpoint", "this run")
    check(contents(run) == before, "the refusal changed the run folder")
    return Came("refused with both hashes; exit 1; the run folder is unchanged", "nothing")


@fault("32", "memory limit", quick=True)
def memory_limit(bench: Bench, folder: Path) -> Came:
    def plant() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), used + (256 << 20)))

    bench.copy_of_broken(folder)
    larger = ["--set", "training.batch_size=16384"]
    ended = bench.resume(folder, "run", *larger, hook=plant).wait().expect(1, "error: out of memory:", "step-000012")
    lines = [line for line in ended.err.splitlines() if "out of memory" in line]
    check(len(lines) == 1, f"{len(lines)} lines")
    expect_whole(folder / "run")
    check(not leftovers(folder / "run"), "left behind")
    bench.resume(folder).wait().expect(0)
    bench.expect_straight(folder / "run")
    return Came(
        "one line that says so, with the last good checkpoint; then resumed, equal to the bit", "2 steps taken again"
    )


@fault("33", "the clock jumps back, times of files are equal or reversed", quick=True)
def clock(bench: Bench, folder: Path) -> Came:
    run = bench.copy_of_broken(folder)
    for age, path in enumerate(checkpoints(run)):
        os.utime(path, (2e9 - age, 2e9 - age))
    before = last_step(run)

    def plant() -> None:
        real = time.time
        time.time = lambda: real() - 10 * 86400

    ended = bench.resume(folder, hook=plant).wait().expect(0)
    check("continuing from" in ended.err and "step-000012" in ended.err, "did not go on from step 12")
    bench.expect_straight(run)
    return Came("the newest is the one of the highest step; equal to the bit", f"{before - 12} steps taken again")


def mounts_left(folder: Path) -> None:
    """Unmount what a fault that was killed left mounted."""
    for line in Path("/proc/mounts").read_text().splitlines() if Path("/proc/mounts").exists() else []:
        target = line.split()[1]
        if target.startswith(str(folder)) and MOUNT.umount2(target.encode(), 2) != 0:
            subprocess.run(["umount", "-l", target], check=False)
