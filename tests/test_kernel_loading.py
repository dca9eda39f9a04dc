"""What a process does that finds its kernels broken, or none at all."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ultrazoo.ops import build

START = """
import logging, sys
from pathlib import Path
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(levelname)s %(message)s")
from ultrazoo.ops import build, compiling
build.AT_INSTALL = Path("missing.so")
compiling.CXX_FLAGS = (*compiling.CXX_FLAGS, "-O0")
plan = compiling.plan
build.plan = compiling.plan = lambda *what: [step for step in plan(*what) if step.source.startswith(("common", "rk4"))]
"""
TRAIN = """
import torch
from ultrazoo.ops import kernel_policy, kernel_status, rk4_combine, rk4_stage
x = torch.randn(3, 5, requires_grad=True)
rk4_combine(x, x, x, rk4_stage(x, x, 0.5), x, 1.0).sum().backward()
assert torch.allclose(x.grad, torch.full_like(x, 2 + 1 / 6)), x.grad
"""


def run(tmp_path: Path, script: str, **environment: str) -> str:
    command = [sys.executable, "-c", START + script]
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(tmp_path),
        "ULTRAZOO_KERNELS": "auto",
        "ULTRAZOO_CUDA": "0",
        **environment,
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_cached_library_that_does_not_load_is_built_again_and_used(tmp_path: Path) -> None:
    try:
        build.find_compiler()
    except build.BuildError as error:
        pytest.skip(error.reason)
    key = run(tmp_path, "print(build.build_key(build.find_sources()))").strip()
    folder = tmp_path / "ultrazoo/kernels" / key
    folder.mkdir(parents=True)
    (folder / "library.so").write_bytes(b"not a library")
    (folder / "build.json").write_text(json.dumps({"sha256": hashlib.sha256(b"not a library").hexdigest()}))
    script = """
import torch
from ultrazoo.ops import kernel_status, rk4_combine
x = torch.randn(3, 5)
out = torch.compile(lambda x: rk4_combine(x, x, x, x, x, 1.0), fullgraph=True, backend="aot_eager")(x)
assert torch.allclose(out, 2 * x)
assert torch._C._dispatch_has_kernel_for_dispatch_key("ultrazoo::rk4_combine", "CPU")  # a compiled graph loads too
assert kernel_status("ultrazoo::rk4_combine", "cpu").compiled
"""
    said = run(tmp_path, script + TRAIN)
    assert "library.so does not load" in said and said.count("compiling") == 1
    said = run(tmp_path, TRAIN)
    assert "compiling" not in said and "rk4_stage on cpu runs compiled" in said


def test_without_a_compiler_the_references_train_and_one_line_says_why(tmp_path: Path) -> None:
    script = """
from ultrazoo.errors import KernelUnavailableError
status = kernel_status("ultrazoo::rk4_combine", "cpu")
assert not status.compiled and "no C++ compiler" in status.detail and "CXX" in status.fix, status
with kernel_policy("compiled"):
    try:
        rk4_combine(x, x, x, x, x, 1.0)
    except KernelUnavailableError as error:
        print("RAISED", error)
"""
    said = run(tmp_path, TRAIN + script, CXX="no-such-compiler").splitlines()
    assert said[0] == (
        "WARNING kernels: every op of ultrazoo runs its reference: no C++ compiler: no-such-compiler is not on PATH; "
        "install g++ 11 or clang 14 (or newer), or name one in CXX"
    )
    assert len(said) == 2
    assert said[1].startswith(
        "RAISED kernels: ultrazoo::rk4_combine on cpu: compiled was asked for, but no C++ compiler"
    )


def test_the_policy_reference_builds_nothing(tmp_path: Path) -> None:
    said = run(tmp_path, TRAIN, ULTRAZOO_KERNELS="reference")
    assert "rk4_combine on cpu runs the reference: asked for" in said
    assert not list(tmp_path.iterdir())
