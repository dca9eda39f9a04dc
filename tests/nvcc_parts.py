"""An nvcc that is none, for tests of what is built with one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ultrazoo.ops import nvcc

FAKE = r"""#!/bin/sh
# Answers like nvcc {version}, and compiles a .cu as plain C++.
echo "$@" >> {home}/calls
case "$*" in
  *--version*) echo "Cuda compilation tools, release {version}, V{version}.88" ;;
  *--list-gpu-code*) printf 'sm_%s\n' {codes} ;;
  *--dryrun*) echo '#$ LIBRARIES=  "-L{home}"' >&2 ;;
  *) [ -n "$NVCC_CCBIN" ] || [ ! -e {home}/fails ] || {{ cat {home}/fails >&2; exit 2; }}
     for last; do :; done
     roots=$(echo "$*" | grep -o -e "-I[^ ]*") source=$(echo "$*" | sed 's/.* -c \([^ ]*\).*/\1/')
     exec c++ -x c++ -std=c++20 -fPIC $roots -c "$source" -o "$last" ;;
esac
"""


def fake_nvcc(home: Path, version: str = "13.0", codes: str = "75 80 90 100 120") -> Path:
    """A toolkit in a folder of its own."""
    (home / "bin").mkdir(parents=True, exist_ok=True)
    script = home / "bin/nvcc"
    script.write_text(FAKE.format(home=home, version=version, codes=codes))
    script.chmod(0o755)
    subprocess.run(["ar", "rcs", str(home / "libcudart_static.a")], check=True)
    return script


def use_fake_toolkit(home: Path, patch: pytest.MonkeyPatch) -> Path:
    """Pretend a torch for CUDA 13.0, a toolkit in CUDA_HOME, and no GPU."""
    fake_nvcc(home)
    for name in ("ULTRAZOO_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_PATH", "NVCC_CCBIN"):
        patch.delenv(name, raising=False)
    patch.setenv("CUDA_HOME", str(home))
    patch.setattr(nvcc, "torch_cuda", lambda: "13.0")
    patch.setattr(nvcc, "device_archs", list)
    return home
