"""The nvcc that CUDA kernels are compiled with, and the GPUs that they are compiled for.

Like build.py, this file imports nothing of ultrazoo, nor torch.
"""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .toolkit import BuildError, find_torch

CUDA_ARCHS = (61, 70, 75, 80, 86, 89, 90, 100, 120)
"""Compute capabilities (61 is 6.1) that kernels are compiled for when nobody says which, as far as nvcc has them."""
OLDEST_CUDA = 12
USUAL_CUDA = Path("/usr/local/cuda")


@dataclass(frozen=True)
class Cuda:
    """An nvcc, and what it is to compile for."""

    nvcc: str
    version: str
    archs: tuple[str, ...]
    """``80`` is machine code for devices of capability 8.0; ``80+PTX`` is also what newer ones can translate."""

    @property
    def flags(self) -> tuple[str, ...]:
        """The architectures as nvcc takes them."""
        found = []
        for arch in self.archs:
            number, plus, _ = arch.partition("+")
            code = f"[sm_{number},compute_{number}]" if plus else f"sm_{number}"
            found.append(f"-gencode=arch=compute_{number},code={code}")
        return tuple(found)


def torch_cuda() -> str | None:
    """Return the version of CUDA that torch is built for, such as ``13.0``; None for any other build."""
    found = re.search(r"^cuda\b.*?= *'([\d.]+)'", (find_torch() / "version.py").read_text(), re.MULTILINE)
    return found[1] if found else None


def find_cuda(devices: Iterable[int] | None = None) -> Cuda:
    """Return the nvcc for the CUDA kernels of this torch; ULTRAZOO_CUDA=1 takes any torch, 0 none.

    Args:
        devices: Compute capabilities to compile for, when TORCH_CUDA_ARCH_LIST does not say; None or empty: all.

    Raises:
        BuildError: There are to be no CUDA kernels, or none can be compiled.
    """
    asked, wanted = os.environ.get("ULTRAZOO_CUDA", ""), torch_cuda()
    if asked not in ("", "0", "1"):
        raise BuildError(f"ULTRAZOO_CUDA: got {asked!r}, expected 0 or 1", "unset it")
    if asked == "0":
        raise BuildError("ULTRAZOO_CUDA=0 leaves the CUDA kernels out", "unset it")
    if asked != "1" and wanted is None:
        raise BuildError("this torch is not a CUDA build", "install one that is: https://pytorch.org/get-started")
    nvcc = _find_nvcc(wanted)
    version = re.search(r"\bV(\d[\d.]*)", _ask(nvcc, "--version"))
    if version is None or _major(version[1]) < OLDEST_CUDA:
        got = version[1] if version else "no version"
        raise BuildError(f"{nvcc}: got {got}, expected CUDA {OLDEST_CUDA} or newer", _install(wanted))
    if asked != "1" and wanted is not None and _major(version[1]) > _major(wanted):
        raise BuildError(  # what a driver of CUDA 12 runs would be known only at the first launch
            f"{nvcc} is of CUDA {version[1]}, newer than the CUDA {wanted} that torch is built for", _install(wanted)
        )
    offered = {int(number) for number in re.findall(r"\bsm_(\d+)\b", _ask(nvcc, "--list-gpu-code"))}
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    archs = _listed(listed, offered, nvcc) if listed else _for_devices(devices or (), offered, nvcc)
    return Cuda(nvcc, version[1], archs)


def find_cuda_here() -> Cuda:
    """Return the nvcc for the GPUs that are here, or for what TORCH_CUDA_ARCH_LIST names.

    Raises:
        BuildError: As ``find_cuda``, or there is no GPU, and nobody said that CUDA kernels are wanted all the same.
    """
    devices, asked = device_archs(), os.environ.get("ULTRAZOO_CUDA", "")
    found = find_cuda(devices)
    if not devices and asked != "1" and not os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip():
        raise BuildError(
            "no NVIDIA GPU is here to compile CUDA kernels for",
            "to compile for one elsewhere, name it in TORCH_CUDA_ARCH_LIST, as in 8.0;9.0+PTX",
        )
    return found


def libraries(nvcc: str) -> list[str]:
    """Return the flags that find the libraries of nvcc's toolkit, which may be anywhere when nvcc is a wrapper."""
    found = re.search(r"^#\$ LIBRARIES=(.*)$", _ask(nvcc, "--dryrun", "-x", "cu", os.devnull), re.MULTILINE)
    return shlex.split(found[1]) if found else []


def device_archs() -> list[int]:
    """Return the compute capabilities of this machine's GPUs (61 is 6.1), asked of the driver without starting CUDA."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return []
    if nvml.nvmlInit_v2() != 0:
        return []
    found, count = set(), ctypes.c_uint(0)
    nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    for index in range(count.value):
        device, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
        if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(device)) == 0:
            capability = ctypes.byref(major), ctypes.byref(minor)
            if nvml.nvmlDeviceGetCudaComputeCapability(device, *capability) == 0:
                found.add(10 * major.value + minor.value)
    nvml.nvmlShutdown()
    return sorted(found)


def runs_on(archs: Iterable[str], device: int) -> bool:
    """Tell whether kernels compiled for ``archs`` run on a device: those of its major version, or any older PTX."""
    for arch in archs:
        digits, _, ptx = arch.partition("+")
        number = int(digits.rstrip("af"))
        exact = digits[-1] in "af"  # such code runs on no other device
        if number == device or (number < device and not exact and (ptx or number // 10 == device // 10)):
            return True
    return False


def _find_nvcc(wanted: str | None) -> str:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            nvcc = Path(home) / "bin" / "nvcc"
            if nvcc.is_file():
                return str(nvcc)
            raise BuildError(f"{variable}: {home} has no bin/nvcc", "name the folder of a CUDA toolkit, or unset it")
    usual = USUAL_CUDA / "bin" / "nvcc"
    if found := shutil.which("nvcc") or (str(usual) if usual.is_file() else None):
        return found
    raise BuildError(f"no nvcc: CUDA_HOME is not set, and neither PATH nor {USUAL_CUDA} has one", _install(wanted))


def _install(wanted: str | None) -> str:
    return f"install the CUDA toolkit{f' {wanted}' if wanted else ''}, and name its folder in CUDA_HOME"


def _ask(nvcc: str, *arguments: str) -> str:
    """Return what nvcc says, on stdout or stderr.

    Raises:
        BuildError: It does not run.
    """
    command = shlex.join([nvcc, *arguments])
    try:
        result = subprocess.run([nvcc, *arguments], capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command}: {error}", "mend the CUDA toolkit, or name another in CUDA_HOME") from error
    if result.returncode != 0:
        said = (result.stderr.strip() or result.stdout.strip() or "nothing").splitlines()[0]
        raise BuildError(f"{command}: {said}", "mend the CUDA toolkit, or name another in CUDA_HOME")
    return result.stdout + result.stderr


def _listed(text: str, offered: set[int], nvcc: str) -> tuple[str, ...]:
    """Read TORCH_CUDA_ARCH_LIST: ``8.0;9.0+PTX``, or the same with spaces or commas."""
    archs = []
    for part in re.split(r"[;,\s]+", text.strip(";, ")):
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", part)
        if found is None or int(found[1] + found[2]) not in offered:
            can = ", ".join(f"{number // 10}.{number % 10}" for number in sorted(offered))
            problem = "not a compute capability" if found is None else f"none that {nvcc} compiles for"
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST: got {part!r}, {problem}", f"expected some of {can}, as in 8.0;9.0+PTX"
            )
        archs.append(f"{found[1]}{found[2]}{found[3]}{found[4] or ''}")
    return tuple(dict.fromkeys(archs))


def _for_devices(devices: Iterable[int], offered: set[int], nvcc: str) -> tuple[str, ...]:
    """Choose for each device the code that fits it best, or else PTX; without devices, code for all and PTX.

    A device that nvcc knows nothing for is left out beside others: its tensors go to the references.
    """
    archs, lacking = [], []
    for device in sorted(devices):
        kin = [number for number in offered if number // 10 == device // 10 and number <= device]
        older = [number for number in offered if number < device]
        if kin or older:
            archs.append(str(max(kin)) if kin else f"{max(older)}+PTX")
        else:
            lacking.append(device)
    if lacking and not archs:
        raise BuildError(
            f"{nvcc} does not compile for this machine's GPU, of compute capability {lacking[-1] / 10}",
            "install a CUDA toolkit that does (CUDA 12 for those before 7.5), and name its folder in CUDA_HOME",
        )
    if not archs:
        archs = [str(number) for number in CUDA_ARCHS if number in offered]
        archs[-1] += "+PTX"
    return tuple(dict.fromkeys(archs))


def _major(version: str) -> int:
    return int(version.partition(".")[0])
