"""Throwaway plugin distributions with a compiled kernel, as pip would leave them in a folder of site-packages."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

KERNELS = """
#pragma once
#include "common/isa.h"
#include "common/types.h"
namespace uz {
struct ScaleAdd {
  const void *x, *y;
  void* out;
  DType dtype;
  float a;
};
struct ScaleAddKernels {
  void (*run)(const ScaleAdd&, int64_t begin, int64_t end);
};
UZ_KERNELS(ScaleAddKernels, scale_add_kernels)
}  // namespace uz
"""

CPU = """
#include "common/simd.h"
#include "scale_add/kernels.h"
#include "shared/term.h"
namespace uz::UZ_ISA {
namespace {
void run(const ScaleAdd& s, int64_t begin, int64_t end) {
  visit(s.dtype, [&]<class T>(T) {
    const T *x = static_cast<const T*>(s.x), *y = static_cast<const T*>(s.y);
    T* out = static_cast<T*>(s.out);
    for_vectors(begin, end, [&](int64_t i, auto... n) {
      const Vec rest = y == nullptr ? set1(0.0f) : term(load(y + i, n...));
      store(out + i, fma(set1(s.a), load(x + i, n...), rest), n...);
    });
  });
}
}  // namespace
const ScaleAddKernels scale_add_kernels = {run};
}  // namespace uz::UZ_ISA
"""

TERM = """
#pragma once
#include "common/simd.h"
namespace uz::UZ_ISA {
inline Vec term(Vec y) { return set1(SIGN 1.0f) * y; }
}  // namespace uz::UZ_ISA
"""

BIND = """
#include "common/bind.h"
#include "scale_add/kernels.h"
namespace uz {
namespace {
Tensor run(const Tensor& given, const void* y, double a) {
  const Tensor x = torch::stable::contiguous(given), out = empty_contiguous(x, x.scalar_type());
  const ScaleAdd args = {x.const_data_ptr(), y, out.mutable_data_ptr(), dtype_of(x, "scale_add"),
                         static_cast<float>(a)};
  scale_add_kernels().run(args, 0, x.numel());
  return out;
}
Tensor scale_add(const Tensor& x, const Tensor& y, double a) {
  check_same_shape(x, y, "scale_add");
  const Tensor other = torch::stable::contiguous(y);
  return run(x, other.const_data_ptr(), a);
}
Tensor scale_add_backward(const Tensor& grad, double a) { return run(grad, nullptr, a); }
}  // namespace
STABLE_TORCH_LIBRARY_IMPL(NAME, CPU, m) {
  m.impl("scale_add", TORCH_BOX(&scale_add));
  m.impl("scale_add_backward", TORCH_BOX(&scale_add_backward));
}
}  // namespace uz
"""


def install(site: Path, name: str, sign: str = "+") -> Path:
    """Write a distribution ``ultrazoo-<name>`` whose op is a * x ± y; its C++ symbols do not depend on the name.

    Returns:
        Its csrc/.
    """
    package, about = site / f"ultrazoo_{name}", site / f"ultrazoo_{name}-0.3.0.dist-info"
    for folder in (about, package / "csrc/scale_add", package / "csrc/shared"):
        folder.mkdir(parents=True)
    text = (ROOT / "docs/plugin-kernels.md").read_text().partition("## The kernels")[0]
    (module,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)  # the documented one works
    for theirs, mine in (("decay", name), ("a * x + y", f"a * x {sign} y"), (", grad, None", f", {sign}grad, None")):
        assert theirs in module
        module = module.replace(theirs, mine)
    (package / "__init__.py").write_text(module)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: ultrazoo-{name}\nVersion: 0.3.0\n")
    (about / "entry_points.txt").write_text(f"[ultrazoo]\n{name} = ultrazoo_{name}\n")
    (about / "top_level.txt").write_text(f"ultrazoo_{name}\n")
    sources = package / "csrc"
    (sources / "scale_add/kernels.h").write_text(KERNELS)
    (sources / "scale_add/cpu.cpp").write_text(CPU)
    (sources / "scale_add/bind.cpp").write_text(BIND.replace("NAME", name))
    (sources / "shared/term.h").write_text(TERM.replace("SIGN", sign))
    return sources


START = """
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(levelname)s %(message)s")
from ultrazoo.ops import compiling
compiling.CXX_FLAGS = (*compiling.CXX_FLAGS, "-O0")
"""


def run(site: Path, cache: Path, script: str, **environment: str) -> str:
    """Run Python where the distributions of ``site`` are installed, and return what it says."""
    path = os.pathsep.join((str(site), str(ROOT), os.environ.get("PYTHONPATH", "")))
    child = {**os.environ, "PYTHONPATH": path, "XDG_CACHE_HOME": str(cache), "ULTRAZOO_KERNELS": "auto"}
    child["ULTRAZOO_DISABLE_PLUGINS"] = ""
    child |= {"ULTRAZOO_CUDA": "0", "ULTRAZOO_LOG": "INFO", **environment}
    done = subprocess.run(
        [sys.executable, "-c", START + script], env=child, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
