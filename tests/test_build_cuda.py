"""CUDA kernels in the library: when they are compiled, kept and replaced, and what happens when nvcc fails."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from nvcc_parts import fake_nvcc, use_fake_toolkit

from ultrazoo.ops import build, compiling, loader, nvcc, status, toolkit

ROOT = Path(__file__).resolve().parents[1]
try:
    build.find_compiler()
except build.BuildError as error:
    pytest.skip(error.reason, allow_module_level=True)

LAUNCHERS = """#include "rk4/kernels.h"
namespace uz::cuda {
Error rk4_combine(const Rk4Combine&, int64_t, Stream) { return "no GPU"; }
Error rk4_stage(const Rk4Stage&, int64_t, Stream) { return "no GPU"; }
}
"""
NO_ROOM = "echo 'fatal error: error writing to /tmp/x.o: No space left on device' >&2; exit 1"
LOADED = """
import sys, torch
from pathlib import Path
from ultrazoo.ops import loader, rk4_stage
from torch._subclasses.fake_tensor import FakeTensorMode
loader._loaded.clear()
loader.build.library = lambda **_: Path(sys.argv[1])
assert loader.load().path, loader.load()
for device in ("CPU", "CUDA"):
    for op in ("rk4_combine", "rk4_stage"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ultrazoo::{op}", device), (op, device)
with FakeTensorMode():
    y = rk4_stage(torch.empty(3, 5, device="cuda"), torch.empty(3, 5, device="cuda"), 0.5)
assert y.shape == (3, 5) and y.device.type == "cuda"
assert torch.equal(rk4_stage(torch.ones(3), torch.ones(3), 0.5), torch.full((3,), 1.5))
"""


@pytest.fixture
def toolkit_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return use_fake_toolkit(tmp_path / "toolkit", monkeypatch)


@pytest.fixture(scope="session")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("objects")


@pytest.fixture
def sources(tmp_path: Path, toolkit_home: Path, objects: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A csrc of one op, whose cuda.cu the fake nvcc can compile, and a cache that keeps object files."""
    original, copy = build.find_sources(), tmp_path / "csrc"
    assert original is not None
    for folder in ("common", "rk4"):
        shutil.copytree(original / folder, copy / folder)
    (copy / "rk4/cuda.cu").write_text(LAUNCHERS)
    monkeypatch.setattr(nvcc, "device_archs", lambda: [75, 90])
    monkeypatch.setattr(build, "find_sources", lambda: copy)
    monkeypatch.setattr(build, "AT_INSTALL", tmp_path / "missing.so")
    monkeypatch.setattr(compiling, "CXX_FLAGS", (*build.CXX_FLAGS, "-O0"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cache = build.cache_folder()
    (cache / "objects").symlink_to(objects)
    return copy


def test_a_library_with_cuda_kernels_is_built_once_and_kept_without_nvcc(
    sources: Path, toolkit_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = build.library()
    key = build.build_key(sources)
    assert build.made_from(library) == build.Made(key, "13.0.88", ("75", "90"))
    assert library.parent.name.startswith(f"{key}-") and build.without_cuda(library) is None
    subprocess.run([sys.executable, "-c", LOADED, str(library)], cwd=ROOT, check=True)
    compiled = [line for line in (toolkit_home / "calls").read_text().splitlines() if " -c " in line]
    assert len(compiled) == 1 and "-gencode=arch=compute_75,code=sm_75" in compiled[0]

    monkeypatch.setattr(nvcc, "device_archs", lambda: [90])  # what is there serves this GPU
    assert build.library() == library
    monkeypatch.setenv("CUDA_HOME", "/no/where")  # nvcc is gone, the kernels stay
    assert build.library() == library
    monkeypatch.setenv("CUDA_HOME", str(toolkit_home))
    fake_nvcc(toolkit_home, codes="70 75 80 90 100 120")
    monkeypatch.setattr(nvcc, "device_archs", lambda: [70, 90])  # nothing there serves the older one
    assert build.made_from(build.library()).archs == ("70", "90")


def test_a_failing_nvcc_leaves_the_cpu_kernels_and_says_so_in_one_line(
    sources: Path, toolkit_home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build.log, "propagate", True)
    (toolkit_home / "fails").write_text(
        "In file included\ncrt/host_config.h: #error -- unsupported GNU version! gcc 99\n"
    )
    library = build.library()
    (warning,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert "\n" not in warning.getMessage() and "NVCC_CCBIN" in warning.getMessage()
    failed = build.without_cuda(library)
    assert failed is not None and failed.reason.endswith("unsupported GNU version! gcc 99")
    assert "In file included" in (library.parent / "nvcc.txt").read_text()
    assert build.made_from(library).archs == () and json.loads((library.parent / "build.json").read_text())["sha256"]
    calls = (toolkit_home / "calls").read_text().count(" -c ")
    assert build.library() == library and (toolkit_home / "calls").read_text().count(" -c ") == calls  # not again
    monkeypatch.setenv("NVCC_CCBIN", "g++-13")  # the fix: that is another build
    assert build.without_cuda(build.library()) is None


@pytest.mark.parametrize(
    "ending", ["kill -9 $$", "exit 130", "echo nvcc error: 'cicc' died due to signal 9 >&2; exit 9", NO_ROOM]
)
def test_an_interrupted_nvcc_is_not_remembered_as_one_that_fails(
    sources: Path, toolkit_home: Path, ending: str
) -> None:
    whole = (toolkit_home / "bin/nvcc").read_text()
    broken = whole.replace("\ncase ", f'\ncase "$*" in *" -c "*) {ending} ;; esac\ncase ', 1)
    assert broken != whole
    (toolkit_home / "bin/nvcc").write_text(broken)
    with pytest.raises(build.InterruptedBuildError, match=r"nvcc did not finish .*cuda\.cu") as caught:
        build.library()
    assert "MAX_JOBS=1" in caught.value.fix and not list(build.cache_folder().glob("*/build.json"))
    (toolkit_home / "bin/nvcc").write_text(whole)
    assert build.made_from(build.library()).archs == ("75", "90")


def test_without_a_gpu_the_cpu_kernels_that_are_there_are_taken(
    sources: Path, toolkit_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvcc, "device_archs", list)
    library = build.library()
    assert library.parent.name == build.build_key(sources) and not build.made_from(library).archs
    installed = Path(shutil.copy(library, tmp_path / "_C.so"))
    monkeypatch.setattr(build, "AT_INSTALL", installed)
    assert build.library() == installed
    assert " -c " not in (toolkit_home / "calls").read_text(), "nothing is compiled for a GPU that is not here"
    why = build.without_cuda(installed)
    assert why is not None and "no NVIDIA GPU is here" in why.reason and "TORCH_CUDA_ARCH_LIST" in why.fix
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")  # for another machine
    assert build.made_from(build.library()).archs == ("90",)


def test_an_error_in_the_cpu_kernels_is_none_of_nvcc(sources: Path) -> None:
    (sources / "common/isa.cpp").write_text('#error "not today"\n')
    with pytest.raises(build.BuildError, match="not today") as caught:
        build.library()
    assert not isinstance(caught.value, toolkit.CudaError)


def test_a_library_of_the_install_without_cuda_kernels_is_replaced(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ULTRAZOO_CUDA", "0")
    installed = Path(shutil.copy(build.library(), tmp_path / "_C.so"))
    monkeypatch.setattr(build, "AT_INSTALL", installed)
    assert build.library() == installed
    monkeypatch.delenv("ULTRAZOO_CUDA")
    cached = build.library()
    assert cached != installed and build.without_cuda(cached) is None
    shutil.copy(cached, installed)
    assert build.library() == installed
    monkeypatch.setenv("CUDA_HOME", "/no/where")  # compiled in one image, run in another
    assert build.library() == installed


def test_a_torch_for_cpus_never_calls_nvcc(sources: Path, toolkit_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvcc, "torch_cuda", lambda: None)
    library = build.library()
    assert library.parent.name == build.build_key(sources) and not (toolkit_home / "calls").exists()
    why = build.without_cuda(library)
    assert why is not None and why.reason == "this torch is not a CUDA build"


def test_a_plugin_has_cuda_kernels_of_its_own(
    sources: Path, toolkit_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.move(sources / "rk4", tmp_path / "plugin/csrc/rk4")
    plugin = build.of_plugin("mine", tmp_path / "plugin/csrc")
    assert plugin.sources is not None
    for name in ("bind.cpp", "bind_cuda.cpp"):
        file = plugin.sources / "rk4" / name
        file.write_text(file.read_text().replace("IMPL(ultrazoo", "IMPL(mine"))
    library = build.library(of=plugin)
    assert library.parents[1].name == "kernels-mine" and build.made_from(library).archs
    assert build.without_cuda(library, plugin.sources) is None and build.library(of=plugin) == library
    calls = (toolkit_home / "calls").read_text().count(" -c ")
    (plugin.sources / "rk4/cuda.cu").unlink()  # a plugin without: nothing is asked of nvcc
    bare = build.library(of=plugin)
    why = build.without_cuda(bare, plugin.sources)
    assert why is not None and why.reason == f"{plugin.sources} has no CUDA kernels"
    assert not build.made_from(bare).archs and (toolkit_home / "calls").read_text().count(" -c ") == calls
    installed = Path(shutil.copy(bare, plugin.at_install))
    assert build.library(of=plugin) == installed == tmp_path / "plugin/_C.so"


def test_nvcc_compiles_kernels_that_load_without_a_gpu(
    tmp_path: Path, objects: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ULTRAZOO_CUDA", "1")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    try:
        cuda = build.find_cuda()
    except build.BuildError as error:
        pytest.skip(error.reason)
    original, copy = build.find_sources(), tmp_path / "csrc"
    assert original is not None
    for folder in ("common", "rk4"):
        shutil.copytree(original / folder, copy / folder)
    monkeypatch.setattr(compiling, "CXX_FLAGS", (*build.CXX_FLAGS, "-O0"))
    build.compile_library(copy, objects, tmp_path / "library.so", cuda=cuda)
    subprocess.run([sys.executable, "-c", LOADED, str(tmp_path / "library.so")], cwd=ROOT, check=True)
    nm = shutil.which("nm")
    if nm is not None:  # the runtime is linked statically, and stays our own beside torch's
        symbols = subprocess.run([nm, "-D", str(tmp_path / "library.so")], capture_output=True, text=True, check=True)
        assert not [line for line in symbols.stdout.splitlines() if " cuda" in line]


def test_kernels_without_code_for_a_gpu_are_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = build.Made("key", "13.0", ("80", "86"))
    monkeypatch.setattr(loader, "cuda_kernels", lambda namespace: made)
    monkeypatch.setattr(loader, "_lacking", {})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(8, 9), (9, 0)][index])
    assert loader.lacks_code_for("ultrazoo", 0) == ""
    assert loader.lacks_code_for("ultrazoo", 1) == "its CUDA code is for 80 86, the GPU is 9.0"
    op = SimpleNamespace(namespace="ultrazoo", has_kernel=lambda device: True)
    assert status.of_op("ultrazoo::op", "cuda", {"ultrazoo::op": op}).compiled, "one of the two has it"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(loader, "_lacking", {})
    found = status.of_op("ultrazoo::op", "cuda", {"ultrazoo::op": op})
    assert not found.compiled and "the GPU is 9.0" in found.detail and "TORCH_CUDA_ARCH_LIST" in found.fix
