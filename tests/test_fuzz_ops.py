"""A short run of the fuzzer in a process of its own, and what it reports."""

from __future__ import annotations

import ctypes
import faulthandler
import signal
import subprocess
import sys
import time
from pathlib import Path

import fuzz_ops
import pytest
import torch
from fuzz_memory import block

from ultrazoo.ops.loader import load
from ultrazoo.registry import registry

SCRIPT = Path(fuzz_ops.__file__)


def test_no_call_ends_with_a_signal_and_no_wrong_one_is_accepted() -> None:
    command = [sys.executable, str(SCRIPT), "--calls", "300", "--batch", "30"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("| 0 | 0 |\n") == len(fuzz_ops.DIRECTIONS)
    assert "300 calls of 15 ops and directions" in done.stdout


def test_what_goes_wrong_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read one byte beyond the end, a call that does not end, an op that checks nothing."""
    registry().ops()
    assert load().handle is not None
    monkeypatch.setattr(fuzz_ops, "SECONDS", 1)

    def beyond(*_: object) -> list[torch.Tensor]:
        x = block((5,), torch.float32, at_end=True)
        assert len(ctypes.string_at(x.data_ptr(), 20)) == 20
        faulthandler.disable()  # it would print pytest's stack
        ctypes.string_at(x.data_ptr(), 21)
        return []

    def forever(*_: object) -> list[torch.Tensor]:
        while True:
            time.sleep(1)

    for call, message in (
        (beyond, f"status {-signal.SIGSEGV}"),
        (forever, "not done after 1 s"),
        (lambda *_: [], "accepted with"),
    ):
        monkeypatch.setattr(fuzz_ops, "call", call)
        tally = fuzz_ops.Tally()
        fuzz_ops.in_child(tally, 0, "dropout", "forward", 1, 2)
        assert len(tally.failures) == 1 and message in tally.failures[0]
