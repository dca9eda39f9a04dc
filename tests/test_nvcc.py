"""Which nvcc is taken, for which GPUs, and the reasons why there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from nvcc_parts import fake_nvcc, use_fake_toolkit

from ultrazoo.ops import build, nvcc

ROOT = Path(__file__).resolve().parents[1]
try:
    COMPILER = build.find_compiler()
except build.BuildError as error:
    pytest.skip(error.reason, allow_module_level=True)


@pytest.fixture
def toolkit_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return use_fake_toolkit(tmp_path / "toolkit", monkeypatch)


@pytest.mark.parametrize(
    ("environment", "wanted", "reason", "fix"),
    [
        ({}, None, "this torch is not a CUDA build", "pytorch.org"),
        ({"ULTRAZOO_CUDA": "0"}, "13.0", "ULTRAZOO_CUDA=0 leaves the CUDA kernels out", "unset"),
        ({"ULTRAZOO_CUDA": "yes"}, "13.0", "ULTRAZOO_CUDA: got 'yes', expected 0 or 1", "unset"),
        ({"CUDA_HOME": "/no/where"}, "13.0", "CUDA_HOME: /no/where has no bin/nvcc", "toolkit"),
        ({"CUDA_HOME": "", "PATH": "/no/where"}, "12.8", "no nvcc: CUDA_HOME is not set", "toolkit 12.8"),
        ({}, "12.8", "is of CUDA 13.0.88, newer than the CUDA 12.8 that torch", "toolkit 12.8"),
        ({"TORCH_CUDA_ARCH_LIST": "8.0;6.1"}, "13.0", "got '6.1', none that", "expected some of 7.5, 8.0, 9.0, 10.0"),
        ({"TORCH_CUDA_ARCH_LIST": "Hopper"}, "13.0", "got 'Hopper', not a compute capability", "8.0;9.0+PTX"),
    ],
)
def test_why_there_are_no_cuda_kernels_and_the_fix(
    toolkit_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    wanted: str | None,
    reason: str,
    fix: str,
) -> None:
    monkeypatch.setattr(nvcc, "torch_cuda", lambda: wanted)
    monkeypatch.setattr(nvcc, "USUAL_CUDA", toolkit_home / "elsewhere")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(build.BuildError) as caught:
        build.find_cuda()
    assert reason in caught.value.reason and fix in caught.value.fix


def test_a_toolkit_that_is_too_old_or_broken_is_named(toolkit_home: Path) -> None:
    fake_nvcc(toolkit_home, version="11.8")
    with pytest.raises(build.BuildError, match=r"got 11.8.88, expected CUDA 12 or newer; install the CUDA toolkit 13"):
        build.find_cuda()
    (toolkit_home / "bin/nvcc").write_text("#!/bin/sh\necho no licence >&2; exit 1\n")
    with pytest.raises(build.BuildError, match=r"bin/nvcc --version: no licence; mend"):
        build.find_cuda()


@pytest.mark.parametrize(
    ("listed", "devices", "archs"),
    [
        ("8.0;9.0+PTX", [75], ["80", "90+PTX"]),
        ("8.0 9.0a, 8.0", [], ["80", "90a"]),
        ("", [], ["75", "80", "90", "100", "120+PTX"]),
        ("", [80, 90], ["80", "90"]),
        ("", [86, 103, 130], ["80", "100", "120+PTX"]),
    ],
)
def test_the_architectures(
    toolkit_home: Path, monkeypatch: pytest.MonkeyPatch, listed: str, devices: list[int], archs: list[str]
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    found = build.find_cuda(devices)
    assert list(found.archs) == archs and found.version == "13.0.88"
    if "120+PTX" in archs:
        assert "-gencode=arch=compute_120,code=[sm_120,compute_120]" in found.flags


def test_a_gpu_that_nvcc_no_longer_knows(toolkit_home: Path) -> None:
    with pytest.raises(build.BuildError, match=r"GPU, of compute capability 6.1; install .*CUDA 12 for those before"):
        build.find_cuda([61])
    assert build.find_cuda([61, 90]).archs == ("90",), "the newer one has its kernels all the same"
    fake_nvcc(toolkit_home, version="12.8", codes="50 60 61 70 75 80 90")
    assert build.find_cuda().archs == ("61", "70", "75", "80", "90+PTX")


@pytest.mark.parametrize(
    ("archs", "device", "runs"),
    [
        ("80", 86, True),
        ("86", 80, False),
        ("80", 90, False),
        ("80+PTX", 90, True),
        ("90a", 90, True),
        ("90a", 93, False),
    ],
)
def test_what_runs_on_a_device(archs: str, device: int, runs: bool) -> None:
    assert nvcc.runs_on([archs], device) is runs


def test_the_driver_is_asked_for_the_devices(tmp_path: Path) -> None:
    source = """extern "C" {
int nvmlInit_v2() { return 0; } int nvmlShutdown() { return 0; }
int nvmlDeviceGetCount_v2(unsigned* n) { *n = 3; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void** d) { *d = (void*)(long)(i + 1); return i == 1; }
int nvmlDeviceGetCudaComputeCapability(void* d, int* a, int* b) { *a = 6 + (long)d; *b = 5; return 0; }
}"""
    (tmp_path / "nvml.cpp").write_text(source)
    command = [*COMPILER.split(), "-shared", "-fPIC", "nvml.cpp", "-o", "libnvidia-ml.so.1"]
    subprocess.run(command, cwd=tmp_path, check=True)
    script = "from ultrazoo.ops import nvcc; print(nvcc.device_archs())"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "[75, 95]", done.stderr


def test_torch_is_asked_for_its_cuda_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert nvcc.torch_cuda() == torch.version.cuda
    monkeypatch.setattr(nvcc, "find_torch", lambda: tmp_path)
    for line, version in (("cuda: Optional[str] = '13.0'", "13.0"), ("cuda = None", None), ("hip = '6.4'", None)):
        (tmp_path / "version.py").write_text(f"__all__ = ['cuda']\n{line}\nhip: Optional[str] = '6.4'\n")
        assert nvcc.torch_cuda() == version
