"""Streams that break: messages are dropped, results that are lost end the command."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_parts import call

pytestmark = pytest.mark.skipif(os.name == "nt", reason="pipes and devices of POSIX")

MESSAGES = """
import os, sys
from ultrazoo import output
output.install()
for number in range(2000):
    print("message", number, file=sys.stderr)
with open({path!r}, "w") as file:
    assert file.fileno() > 2
os.write(2, b"printed by a library") if {raw} else None
open({path!r}, "a").write("done")
"""


def python(code: str, **streams: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code], **streams)  # type: ignore[call-overload]


def closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("stream", ["pipe", "disk", "closed"])
def test_messages_that_cannot_be_written_are_dropped(tmp_path: Path, stream: str) -> None:
    path, raw = tmp_path / "file", stream == "closed"
    code = MESSAGES.format(path=str(path), raw=raw)
    if stream == "closed":
        shell = f"exec '{sys.executable}' -c \"$CODE\" 0<&- 1>&- 2>&-"
        done = subprocess.run(["sh", "-c", shell], env={**os.environ, "CODE": code}, check=False)
        assert done.returncode == 0
    else:
        target = closed_pipe() if stream == "pipe" else os.open("/dev/full", os.O_WRONLY)
        assert python(code, stderr=target).wait(30) == 0
        os.close(target)
    assert path.read_text() == "done"


def test_a_slow_reader_gets_every_message_though_the_pipe_does_not_block(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    process = python(MESSAGES.format(path=str(tmp_path / "file"), raw=False), stderr=writer)
    os.close(writer)
    time.sleep(0.5)
    with os.fdopen(reader) as lines:
        assert lines.read() == "".join(f"message {number}\n" for number in range(2000))
    assert process.wait(30) == 0


def test_a_reader_that_does_not_read_is_waited_for_until_a_stop() -> None:
    code = (
        "import signal, sys\nfrom ultrazoo import output\noutput.install()\n"
        "signal.signal(signal.SIGTERM, lambda *_: (output.stop_waiting(), output.notify('stop')))\n"
        "for _ in range(20):\n    sys.stderr.write('x' * 9999 + chr(10))\n"
    )
    reader, writer = os.pipe()
    process = python(code, stderr=writer)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.5)
    process.terminate()
    assert process.wait(10) == 0
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("command", ["--version", "--help"])
def test_results_for_a_reader_that_is_gone_end_the_command_silently(command: str) -> None:
    writer = closed_pipe()
    done = subprocess.run(
        [sys.executable, "-m", "ultrazoo", command], stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_results_for_a_full_disk_are_an_error() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ultrazoo", "--version"], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: standard output: cannot be written: No space left on device; the output is")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("first line\nsecond"), "unexpected RuntimeError: first line; a bug in ultrazoo or in a plugin; "),
        (RecursionError("too deep"), "unexpected RecursionError: too deep; "),
        (KeyError(), "unexpected KeyError: no message; "),
        (ValueError("x" * 100_000), "unexpected ValueError: xxx"),
        (PermissionError(13, "Permission denied", "/there"), "[Errno 13] Permission denied: '/there'; "),
    ],
)
def test_any_exception_is_one_line_that_says_how_to_get_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, message: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("ultrazoo.train.inspection.inspect_path", fail)
    assert call("inspect", "anything") == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and len(err) < 700
    assert err.startswith(f"error: {message}") and err.endswith("set ULTRAZOO_DEBUG=1 to see the traceback\n")
    monkeypatch.setenv("ULTRAZOO_DEBUG", "1")
    assert call("inspect", "anything") == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err
