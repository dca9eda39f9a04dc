"""The table of compiled CUDA kernels: what is read from the compilers, occupancy, the gate, and the time model."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import cuda_compile as compiling  # noqa: E402
import cuda_devices as devices  # noqa: E402
import cuda_matrix as matrix  # noqa: E402
import cuda_model as model  # noqa: E402
import cuda_work as work  # noqa: E402
from cuda_launches import Launch  # noqa: E402

from ultrazoo.ops import build  # noqa: E402

PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN2uz4cuda39_GLOBAL__N__44bfde04_7_cuda_cu_bf51e93312stage_kernelIffEEvPKT_' for 'sm_80'
ptxas info    : Function properties for _ZN2uz4cuda39_GLOBAL__N__44bfde04_7_cuda_cu_bf51e93312stage_kernelIffEEvPKT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_Z4spilv' for 'sm_90a'
ptxas info    : Function properties for _Z4spilv
    64 bytes stack frame, 72 bytes spill stores, 80 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 64 bytes cumulative stack size, 8448 bytes smem, 400 bytes cmem[0]
"""  # noqa: E501
SASS = """
        Function : _Z4spilv
        /*0000*/                   MOV R1, c[0x0][0x28] ;    /* 0x00000a00ff017624 */
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
        /*0020*/              @!P0 FFMA R0, R1, R2, R3 ;
        /*0030*/                   FADD R0, R1, R2 ;
        /*0040*/               @P1 BRA 0x20 ;
        /*0050*/                   STL [R1], R0 ;
        /*0060*/               @P0 BRA 0x10 ;
        /*0070*/                   BRA 0x70;
"""
OCCUPANCY = """
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cuda_occupancy.h>
int main(int, char** v) {
  int n[9];
  for (int i = 0; i < 9; ++i) n[i] = atoi(v[i + 1]);
  cudaOccDeviceProp p;
  p.computeMajor = n[0] / 10, p.computeMinor = n[0] % 10, p.maxThreadsPerBlock = 1024, p.warpSize = 32, p.numSms = 1;
  p.maxThreadsPerMultiprocessor = 32 * n[1], p.regsPerBlock = p.regsPerMultiprocessor = 65536;
  p.sharedMemPerBlock = 49152, p.sharedMemPerMultiprocessor = n[2], p.reservedSharedMemPerBlock = n[3];
  p.sharedMemPerBlockOptin = n[2] - n[3];
  cudaOccFuncAttributes a;
  a.maxThreadsPerBlock = 1024, a.numRegs = n[4], a.sharedSizeBytes = n[7], a.numBlockBarriers = 1;
  a.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN, a.maxDynamicSharedSizeBytes = n[2];
  cudaOccDeviceState s;
  cudaOccResult r;
  if (cudaOccMaxActiveBlocksPerMultiprocessor(&r, &p, &a, &s, n[5], n[6])) return 1;
  printf("%d", r.activeBlocksPerMultiprocessor);
}
"""


def kernel(**changed: object) -> compiling.Kernel:
    fields: dict[str, object] = {
        "op": "rk4",
        "mangled": "m",
        "arch": 80,
        "registers": 40,
        "name": "stage_kernel<float>",
    }
    return compiling.Kernel(**{**fields, **changed})  # type: ignore[arg-type]


def launch(**changed: object) -> Launch:
    fields: dict[str, object] = {
        "op": "ultrazoo::rk4_stage",
        "sample": "2048x768",
        "dtype": "float32",
        "device": devices.DEVICES[0].name,
        "backward": False,
        "kernel": "m",
        "grid": (1536, 1, 1),
        "threads": 256,
        "shared": 0,
        "flops": 2.0 * 2048 * 768,
        "bytes": 12.0 * 2048 * 768,
    }
    return Launch(**{**fields, **changed})  # type: ignore[arg-type]


def test_what_ptxas_says_is_read() -> None:
    plain, spills = compiling.read_ptxas("rk4", PTXAS)
    assert (plain.arch, plain.registers, plain.spill_bytes, plain.static_shared) == (80, 32, 0, 0)
    assert (spills.arch, spills.registers, spills.spill_bytes, spills.stack) == (90, 128, 152, 64)
    assert spills.static_shared == 8448


def test_the_machine_code_is_counted_loop_by_loop() -> None:
    found = kernel(mangled="_Z4spilv")
    compiling.read_sass([found], SASS)
    assert found.instructions == Counter({"BRA": 3, "MOV": 1, "LDG.E.128": 1, "FFMA": 1, "FADD": 1, "STL": 1})
    assert [loop.counts for loop in found.loops] == [Counter({"FFMA": 1, "FADD": 1, "BRA": 1})]


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="needs c++filt")
def test_names_are_those_of_the_source() -> None:
    mangled = compiling.read_ptxas("rk4", PTXAS)[0].mangled
    assert compiling.demangled([mangled]) == {mangled: "stage_kernel<float, float>"}
    assert compiling._plain("void uz::cuda::many<__nv_bfloat16, (int)64>(uz::cuda::Args<(bool)1>)") == "many<bf16, 64>"


@pytest.mark.parametrize(
    ("arch", "registers", "threads", "shared", "blocks"),
    [(80, 32, 256, 0, 8), (80, 33, 256, 0, 6), (80, 128, 256, 0, 2), (90, 255, 512, 0, 0), (75, 16, 32, 0, 16),
     (80, 32, 128, 48 * 1024, 3), (86, 32, 128, 48 * 1024, 2), (90, 32, 128, 227 * 1024, 1),
     (80, 32, 64, 164 * 1024, 0)],
)  # fmt: skip
def test_blocks_of_a_multiprocessor(arch: int, registers: int, threads: int, shared: int, blocks: int) -> None:
    assert devices.blocks_per_multiprocessor(arch, registers, threads, shared) == blocks


def test_occupancy_is_that_of_the_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ULTRAZOO_CUDA", "1")
    try:
        nvcc = build.find_cuda().nvcc
    except build.BuildError as error:
        pytest.skip(error.reason)
    (tmp_path / "occupancy.cpp").write_text(OCCUPANCY)
    subprocess.run([nvcc, "occupancy.cpp", "-o", "occupancy"], cwd=tmp_path, check=True)
    for arch, limits in devices.MULTIPROCESSORS.items():
        if arch < 75:
            continue
        for registers, threads, dynamic in (
            (24, 64, 0),
            (65, 96, 5000),
            (128, 128, 20000),
            (40, 1024, 100),
            (168, 384, 1),
        ):
            numbers = (arch, limits.warps, limits.shared, limits.reserved, registers, threads, dynamic, 528, 0)
            told = subprocess.run(
                [tmp_path / "occupancy", *map(str, numbers)], capture_output=True, text=True, check=True
            )
            ours = devices.blocks_per_multiprocessor(arch, registers, threads, dynamic + 528)
            assert ours == int(told.stdout), (numbers, told.stdout)


def test_the_gate() -> None:
    good = kernel()
    assert matrix.check([good], [], {}) == []
    assert matrix.check([good], [], {"rk4/stage_kernel": 40}) == []
    budget = matrix.measured_budget([good, kernel(registers=33), kernel(name="other", registers=1)])
    assert budget == {"rk4/stage_kernel": 40, "rk4/other": 8}
    for bad, words in (
        (kernel(spill_bytes=8, stack=8), "stage_kernel<float> for sm_80 spills: 8 bytes"),
        (kernel(stack=16), "keeps 16 bytes in local memory"),
        (kernel(instructions=Counter({"STL.64": 2, "LDG.E.128": 1})), "2 instructions go there"),
        (kernel(instructions=Counter({"LDG.E": 4})), "stage_kernel<float> for sm_80 has no LDG.E.128 in its code"),
        (kernel(registers=41), "uses 41 registers, its budget is 40"),
    ):
        (problem,) = matrix.check([bad], [], {"rk4/stage_kernel": 40})
        assert words in problem


def test_tensor_cores_have_to_be_in_the_code() -> None:
    fields = {"op": "retention", "name": "retention_states<bf16, false>", "registers": 128}
    plain, loads = Counter({"FFMA": 64}), {"LDSM.16.MT88.4": 2, "LDGSTS.E.BYPASS.128": 4}
    assert matrix.check([kernel(**fields, arch=75, instructions=plain)], [], {}) == []
    assert matrix.check([kernel(**fields, instructions=Counter({"HMMA.1688.F32.TF32": 8, **loads}))], [], {}) == []
    (problem,) = matrix.check([kernel(**fields, instructions=Counter(loads))], [], {})
    assert "retention_states<bf16, false> for sm_80 has no HMMA" in problem


def test_tensor_cores_are_modelled_beside_their_instructions() -> None:
    device, tiles = devices.DEVICES[0], launch(grid=(1080, 1, 1))
    products = work.Work(bytes=0, half=1e9, tf32=2e9)
    found = model.time_of(products, tiles, None, device)
    assert found.bound == "tensor cores" and found.seconds == pytest.approx(1e10 / device.tensor_flops)
    loop = compiling.Loop(Counter({"HMMA": 2, "LDS": 38}))
    slow = model.time_of(products, tiles, kernel(loops=[loop]), device)
    assert slow.seconds == pytest.approx((1e9 / 2048 + 2e9 / 1024) * 20 / device.issue_rate)


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="needs c++filt")
def test_a_launch_that_no_device_takes_is_a_problem() -> None:
    mangled = compiling.read_ptxas("rk4", PTXAS)[0].mangled
    made = kernel(mangled=mangled, registers=128, name="stage_kernel<float, float>")
    fits, large = launch(kernel=mangled, threads=512), launch(kernel=mangled, threads=1024)
    assert matrix.check([made], [fits], {}) == []
    (problem,) = matrix.check([made], [fits, large], {})
    assert "cannot be launched: 1024 threads" in problem


def test_a_kernel_that_only_moves_memory_is_modelled_at_its_floor() -> None:
    device = devices.DEVICES[0]
    (moved,) = work.rk4(work.Call(work.sizes_of("2048x768"), 4, False, ["stage_kernel<float, float>"]))
    found = model.time_of(moved, launch(), None, device)
    memory, arithmetic = model.floors(launch(), device)
    assert found.bound == "memory" and found.seconds == pytest.approx(memory) and arithmetic < memory
    one_block = model.time_of(work.Work(bytes=1, fp=1e9), launch(grid=(1, 1, 1)), None, device)
    assert one_block.seconds == pytest.approx(1e9 / (device.flops / 2) * device.multiprocessors)


def test_instructions_beside_the_main_ones_count() -> None:
    device = devices.DEVICES[0]
    loop = compiling.Loop(Counter({"FFMA": 10, "LDS": 30, "NOP": 7}))
    slow = kernel(loops=[compiling.Loop(Counter({"FFMA": 1, "MOV": 50})), loop])
    found = model.time_of(work.Work(bytes=0, fp=32e9), launch(grid=(1080, 1, 1)), slow, device)
    assert found.bound == "instructions" and found.seconds == pytest.approx(4e9 / device.issue_rate)


@pytest.mark.parametrize("op", ["bitlinear", "retention", "selective_scan"])
def test_gradients_are_counted_launch_by_launch(op: str) -> None:
    sizes = {letter: 64 for letter in "BLHKVDMN"}
    names = {
        "bitlinear": ["quantize_kernel", "absolute_sums_kernel", "pack_kernel", "many_tokens_kernel", "scale_kernel"],
        "retention": ["retention_states<float, false>", "retention_output<float, 1>"] * 2
        + ["retention_output<float, 1>"],
        "selective_scan": ["scan_forward<float>", "scan_forward<float>", "scan_backward<float>"],
    }[op]
    for element in (4, 2):
        found = list(work.WORK[f"ultrazoo::{op}"](work.Call(sizes, element, False, names)))
        assert len(found) == len(names)
        assert all(each.bytes > 0 and each.fp + each.int8 + each.half + each.tf32 > 0 for each in found)


@pytest.mark.slow
def test_the_kernels_of_one_op_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = build.find_sources()
    assert original is not None
    for folder in ("common", "rk4"):
        shutil.copytree(original / folder, tmp_path / "csrc" / folder)
    command = [sys.executable, "bench/cuda_matrix.py", "--quick", "--sources", str(tmp_path / "csrc")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    if "skipped" in done.stdout:
        pytest.skip(done.stdout)
    assert "2 architectures" in done.stdout and " 0 launches" not in done.stdout
