"""Worker processes: deaf to Ctrl-C, gone with their parent, their death and their errors told plainly."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
from data_files import TOKENIZER, build, flip, make_texts, write

from ultrazoo.errors import DataError

SCRIPT = """
import os, signal, sys, time
from data_files import build
from pathlib import Path
import multiprocessing

def main():
    streaming = dict(stream_local_parquet=True, prefer_local_cache=False, dataloader_workers=2, num_workers=4)
    data = build(Path(sys.argv[1]), tokenizer=None, dataset_batch_size=512, **streaming)
    batches = data.train_batches()
    next(batches)
    print("workers", *[child.pid for child in multiprocessing.active_children()], flush=True)
    {rest}

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "data/a.parquet", make_texts(900), group=100)
    return tmp_path


def start(folder: Path, rest: str) -> subprocess.Popen[str]:
    script = folder / "run.py"
    script.write_text(SCRIPT.format(rest=rest))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    environment.pop("TOKENIZERS_PARALLELISM", None)
    command = [sys.executable, str(script), str(folder)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    assert process.stdout is not None
    words = process.stdout.readline().split()
    assert words[:1] == ["workers"] and len(words) == 3, process.communicate()[1]
    return [int(word) for word in words[1:]]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_workers_ignore_signals_and_the_main_process_ends_without_a_word(folder: Path) -> None:
    rest = """
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGINT)
        os.kill(child.pid, signal.SIGTERM)
    for _ in range(60):
        next(batches)
    kept = batches  # still alive when the interpreter ends
    print("done", flush=True)"""
    process = start(folder, rest)
    workers_of(process)
    assert process.stdout is not None and process.stderr is not None
    # read as the line before was: communicate() would miss what the stream holds already
    assert (process.stdout.read(), process.stderr.read(), process.wait(60)) == ("done\n", "", 0)


def test_workers_end_with_a_parent_that_is_killed(folder: Path) -> None:
    process = start(folder, "time.sleep(60)")
    workers = workers_of(process)
    assert all(alive(pid) for pid in workers)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers outlived their parent"
        time.sleep(0.1)


def test_a_killed_worker_is_an_error_when_its_window_is_due(folder: Path) -> None:
    before = set(multiprocessing.active_children())
    batches = build(folder, dataloader_workers=2).train_batches()
    next(batches)
    victim = next(iter(set(multiprocessing.active_children()) - before))
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    victim.join(10)
    with pytest.raises(
        DataError, match=rf"training\.dataloader_workers: DataLoader worker .*{victim.pid}.*fewer workers"
    ):
        list(islice(batches, 2000))
    assert not set(multiprocessing.active_children()) - before


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_row_group_is_the_same_error_from_a_worker(folder: Path, workers: int) -> None:
    flip(folder / "data/a.parquet", group=8)
    changes = {"stream_local_parquet": True, "shuffle": False, "on_bad_data": "error"}
    data = build(folder, dataloader_workers=workers, **changes)
    with pytest.raises(DataError, match=r"a\.parquet: row group 8 is damaged near its row 0") as caught:
        list(islice(data.train_batches(), 500))
    assert "Traceback" not in str(caught.value) and "\n" not in str(caught.value)


def test_the_handlers_of_the_main_process_stay_its_own(folder: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    list(islice(build(folder, dataloader_workers=1, tokenizer=TOKENIZER).train_batches(), 3))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
