"""What is shown fits where it is shown; and the process around a run: signals, devices, memory."""

from __future__ import annotations

import io
import platform
import random
import signal
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from ultrazoo.errors import ConfigError
from ultrazoo.train.display import BarDisplay, PlainDisplay, duration, final_table, make_display
from ultrazoo.train.runtime import keep_memory, memory_bytes, pick_device, rng_state, seed_everything, set_rng_state

RECORD = {"step": 20, "loss": 6.5, "lr": 3e-4, "tokens_per_second": 12345.6, "grad_norm": 0.5, "memory_bytes": 2**29}
RESULT: dict[str, Any] = {
    "run_dir": "runs/x", "steps": 1200, "tokens": 3_456_789, "seconds": 3723.0, "tokens_per_second": 930.4,
    "data_wait_share": 0.004, "train_loss": 5.1, "validation_loss": 5.2, "validation_perplexity": 181.27,
    "validation_accuracy": 0.2, "unigram_entropy": 6.1, "checkpoint": "a", "best_checkpoint": None,
}  # fmt: skip


def terminal(monkeypatch: pytest.MonkeyPatch, **env: str) -> Console:
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", **env}.items():
        monkeypatch.setenv(name, value)
    return Console(file=io.StringIO(), force_terminal=True, width=160)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_pipe_gets_plain_lines() -> None:
    console = Console(file=io.StringIO(), width=40)
    display = make_display(console, 100)
    display.advance(20, 0.2)
    display.record(RECORD, 0.2, 83.0)
    display.say("[not markup] " + "long " * 20)
    display.close()
    assert isinstance(display, PlainDisplay)
    first, second = shown(console).splitlines()
    assert first == "step 20/100 loss 6.5000 lr 3.00e-04 tok/s 12,346 grad 0.500 mem 512 MB eta 1:23"
    assert second.startswith("[not markup] long long")


def test_a_terminal_gets_a_bar_and_its_cursor_back(monkeypatch: pytest.MonkeyPatch) -> None:
    console = terminal(monkeypatch)
    display = make_display(console, None)
    assert isinstance(display, BarDisplay)
    display.record(RECORD, 0.2, None)
    display.advance(20, 0.2)
    display.say("a line above")
    display.close()
    text = shown(console)
    for words in ("20%", "loss 6.5000", "a line above", "step 20", "eta -"):
        assert words in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1
    assert "\x1b[1m" in text


def test_no_color_and_dumb_terminals_are_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    display = make_display(console := terminal(monkeypatch, NO_COLOR="1"), None)
    display.record(RECORD, 0.2, None)
    display.close()
    assert "\x1b[38" not in shown(console)
    assert "\x1b[3" not in shown(console).replace("\x1b[3A", "")
    assert isinstance(make_display(terminal(monkeypatch, TERM="dumb"), None), PlainDisplay)


def test_the_table_shows_loss_beside_entropy_and_a_dash_for_the_unknown() -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(final_table(RESULT))
    text = shown(console)
    for words in ("1,200", "3,456,789", "1:02:03", "930", "0.4%", "5.2000", "6.1000", "181.27", "20.00%"):
        assert words in text
    console.print(final_table({**RESULT, "validation_loss": None, "tokens_per_second": None}))
    assert duration(None) == duration(float("inf")) == "-"
    assert duration(59.6) == "1:00"


SIGNALLED = """
import os, signal, time
from ultrazoo.train.signals import SignalGuard
with SignalGuard() as guard:
    os.kill(os.getpid(), signal.SIGUSR1)
    assert guard.take_checkpoint_request() and not guard.take_checkpoint_request()
    os.kill(os.getpid(), signal.SIGINT)
    assert guard.stop is signal.SIGINT
    os.kill(os.getpid(), signal.{second})
    print("went on")
"""


@pytest.mark.parametrize(("second", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_second_signal_ends_the_process_at_once(second: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED.format(second=second)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (code, "")
    assert "SIGINT: finishing the step" in done.stderr
    assert "stopped at once" in done.stderr


def test_devices_that_are_not_there_are_refused() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    count = torch.cuda.device_count()
    with pytest.raises(ConfigError, match=rf"training.device: got 'cuda:{count}'.* sees {count} CUDA device"):
        pick_device(f"cuda:{count}")


def test_random_states_survive_json_values_to_the_bit() -> None:
    seed_everything(7)
    random.gauss(0, 1)
    np.random.standard_normal()
    state = rng_state(torch.device("cpu"))
    drawn = (random.random(), random.gauss(0, 1), np.random.standard_normal(3).tolist(), torch.randn(3).tolist())
    seed_everything(8)
    set_rng_state(state, torch.device("cpu"))
    again = (random.random(), random.gauss(0, 1), np.random.standard_normal(3).tolist(), torch.randn(3).tolist())
    assert drawn == again


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_freed_memory_stays_with_the_process() -> None:
    code = (
        "import torch; from ultrazoo.train.runtime import keep_memory, memory_bytes as used\n"
        "size, cpu = 32 << 20, torch.device('cpu')\n"
        "def held():\n"
        "    before = used(cpu); tensors = [torch.ones(size // 4) for _ in range(2)]; del tensors\n"
        "    return used(cpu) - before\n"
        "given_back = held(); assert keep_memory(); print(given_back < size, held() >= size)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True True\n"
    assert keep_memory()
    assert memory_bytes(torch.device("cpu")) > 1 << 20


def test_the_interrupt_handler_of_before_is_back_after_a_run() -> None:
    from ultrazoo.train.signals import SignalGuard

    before = signal.getsignal(signal.SIGTERM)
    with SignalGuard():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_record_and_a_table_without_targets_say_so() -> None:
    console = Console(file=io.StringIO(), width=200)
    make_display(console, 100).record(RECORD | {"loss": None}, 0.2, 83.0)
    console.print(final_table(RESULT | {"validation_loss": None, "validation_perplexity": None}))
    line, *table = shown(console).splitlines()
    assert line.startswith("step 20/100 loss none (no targets) lr 3.00e-04")
    assert any("validation loss" in row and "none (no targets)" in row for row in table)
