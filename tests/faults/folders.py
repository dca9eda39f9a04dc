"""Run folders that are moved, copied, or made by someone who means harm."""

from __future__ import annotations

import shutil
from pathlib import Path

from faults.parts import Bench, checkpoints, contents, expect_whole, sets
from faults.process import check, cli
from faults.registry import Came, fault


@fault("37", "a run folder copied twice and moved; both copies resumed at once")
def copied(bench: Bench, folder: Path) -> Came:
    original = bench.copy_of_broken(folder)
    before = contents(original)
    copies = [Path(shutil.copytree(original, folder / name)) for name in ("first", "second")]
    running = [cli(folder, "train", copy / "config.yaml", "--resume", "auto") for copy in copies]
    for process in running:
        process.wait().expect(0)
    for copy in copies:
        bench.expect_straight(copy)
    check(contents(original) == before, "the original has changed")
    moved = Path(shutil.move(original, folder / "moved"))
    cli(folder, "resume", moved).wait().expect(0)
    bench.expect_straight(moved)
    check(not original.exists(), "the original came back")
    cli(folder, "resume", moved, "--verify").wait().expect(0, "equal to the last bit")
    return Came("each wrote into itself; all three equal to the bit, the original as it was", "nothing")


@fault("38", "links in a run folder that lead outside")
def links(bench: Bench, folder: Path) -> Came:
    run, outside = bench.copy_of_broken(folder), folder / "outside"
    shutil.copytree(bench.straight / "checkpoints", outside / "checkpoints")
    (outside / "precious").write_text("precious")
    before = contents(outside)
    root = run / "checkpoints"
    for path in (run / "tokenizer.json", root / "best", root / "latest"):
        path.unlink()
        path.symlink_to(outside / "precious")
    for name in ("step-000001", "step-000016", ".step-000004.deleting"):
        (root / name).symlink_to(outside / "checkpoints/step-000024")
    (run / "flight").symlink_to(outside / "checkpoints")
    bench.resume(folder, "run", *sets(max_rolling_checkpoints=1)).wait().expect(0, "moved aside as")
    check(contents(outside) == before, "something outside has changed")
    check(len(checkpoints(run)) >= 1 and expect_whole(run), "no checkpoint")
    for name in ("checkpoints", ".lock"):
        path = run / name
        path.rename(run / f"{name}-there")
        path.symlink_to(outside / "precious")
        bench.resume(folder).wait().expect(2, f"{path} is a symbolic link to {outside / 'precious'}")
        path.unlink()
        (run / f"{name}-there").rename(path)
    check(contents(outside) == before, "something outside has changed")
    return Came("none was followed; those in the way were moved aside or named in the error", "nothing")
