"""The sanitizer run ends in failure on errors planted in a kernel, one kind for each thing it must see."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import sanitize

from ultrazoo.ops import build

try:
    sanitize.runtime()
except build.BuildError as error:
    pytest.skip(str(error), allow_module_level=True)

SWITCH = """
#include <cstdlib>
static int planted() {
  static const char* chosen = std::getenv("ULTRAZOO_PLANTED");
  return chosen == nullptr ? 0 : *chosen - '0';
}
static int spoil(const void* p, int64_t n) {
  if (planted() == 3) return static_cast<int>(n) + 2147483647;
  if (planted() == 4) return *reinterpret_cast<const int*>(static_cast<const char*>(p) + 1);
  return 0;
}
"""
PLANTED = {
    "1": ("load(k + i, n...)", "load(k + i + (planted() == 1 ? sizeof...(n) : 0), n...)", "heap-buffer-overflow"),
    "2": ("store(out + i,", "store(out + i - (planted() == 2 ? 1 : 0),", "heap-buffer-overflow"),
    "3": (
        "const Vec c =",
        "if (end > 1) volatile int n = spoil(a.k, end);\n    const Vec c =",
        "signed integer overflow",
    ),
    "4": ("const Vec c =", "const Vec c =", "misaligned address"),
}
NAMES = {
    "1": "tail of a vector read one element past the end",
    "2": "written one element before the start",
    "3": "overflow",
    "4": "misaligned",
}


def copied(target: Path) -> Path:
    """The sources of rk4 alone, which compile fast."""
    sources = build.find_sources()
    assert sources is not None
    for folder in ("common", "rk4"):
        shutil.copytree(sources / folder, target / folder, dirs_exist_ok=True)
    return target


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with csrc/, where a kernel has all the errors, turned on by ULTRAZOO_PLANTED, and objects/."""
    home = tmp_path_factory.mktemp("sanitize")
    path = copied(home / "csrc") / "rk4/cpu.cpp"
    text = path.read_text().replace("namespace uz::UZ_ISA {", SWITCH + "namespace uz::UZ_ISA {", 1)
    head, stage = text.split("void stage(")
    for old, new, _ in PLANTED.values():
        assert old in stage, f"rk4/cpu.cpp has changed: no {old!r} in stage"
        stage = stage.replace(old, new, 1)
    path.write_text(f"{head}void stage({stage}")
    return home


@pytest.mark.slow
@pytest.mark.parametrize("fault", PLANTED, ids=NAMES.get)
def test_a_planted_error_fails_the_run(
    home: Path, fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ULTRAZOO_PLANTED", fault)
    arguments = ["--sources", str(home / "csrc"), "--objects", str(home / "objects"), "rk4_stage"]
    monkeypatch.setattr(sys, "argv", ["sanitize.py", *arguments])
    assert sanitize.main() == 1
    report = capsys.readouterr().err
    assert PLANTED[fault][2] in report and "rk4/cpu.cpp" in report, report[-3000:]
    assert "FAILED" in report and "in: ultrazoo::rk4_stage, float32" in report


def test_a_masked_access_that_is_not_reported_is_refused(tmp_path: Path) -> None:
    sources = copied(tmp_path)
    sanitize.check_masked(sources)
    file = sources / "rk4/cpu.cpp"
    file.write_text(file.read_text() + "// _mm512_mask_i32gather_ps\n")
    with pytest.raises(build.BuildError, match="does not see"):
        sanitize.check_masked(sources)
