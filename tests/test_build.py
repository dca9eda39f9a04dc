"""The library of kernels: found, built once, rebuilt when it must be, and done without."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ultrazoo.ops import build, compiling

ROOT = Path(__file__).resolve().parents[1]

try:
    COMPILER = build.find_compiler()
except build.BuildError as error:
    pytest.skip(error.reason, allow_module_level=True)


def small_sources(target: Path) -> Path:
    """A csrc with one op in it, which compiles in a second."""
    sources = build.find_sources()
    assert sources is not None
    for folder in ("common", "rk4"):
        shutil.copytree(sources / folder, target / folder)
    return target


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with csrc/ and a cache/ in which it has been built, unoptimised."""
    home = tmp_path_factory.mktemp("built")
    small_sources(home / "csrc")
    with pytest.MonkeyPatch.context() as patch:
        use(patch, home)
        build.library()
    return home


def use(patch: pytest.MonkeyPatch, home: Path) -> None:
    """Make build.py see the csrc and the cache of ``home`` alone."""
    patch.setattr(build, "find_sources", lambda: home / "csrc")
    patch.setattr(build, "AT_INSTALL", home / "missing.so")
    patch.setattr(compiling, "CXX_FLAGS", (*build.CXX_FLAGS, "-O0"))
    patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    patch.setenv("ULTRAZOO_CUDA", "0")


@pytest.fixture
def home(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the built cache beside the same csrc."""
    shutil.copytree(built / "cache", tmp_path / "cache")
    use(monkeypatch, tmp_path)
    monkeypatch.setattr(build, "find_sources", lambda: built / "csrc")
    return tmp_path


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("ultrazoo"), "propagate", True)
    caplog.set_level(logging.INFO, logger="ultrazoo")
    return caplog


def record_of(library: Path) -> dict[str, object]:
    return dict(json.loads(library.with_name("build.json").read_text()))


def test_a_second_call_takes_what_is_there(home: Path, lines: pytest.LogCaptureFixture) -> None:
    library = build.library()
    assert library.parent.parent == home / "cache/ultrazoo/kernels"
    stamp = library.stat().st_mtime_ns
    assert build.library() == library and library.stat().st_mtime_ns == stamp
    assert not lines.records


@pytest.mark.parametrize("damage", ["torn", "not json", "no record", "no library"])
def test_a_damaged_build_is_made_again(home: Path, damage: str, lines: pytest.LogCaptureFixture) -> None:
    library = build.library()
    whole = library.read_bytes()
    if damage == "torn":
        library.write_bytes(whole[: len(whole) // 2])
    elif damage == "not json":
        library.with_name("build.json").write_text("{")
    elif damage == "no record":
        library.with_name("build.json").unlink()
    else:
        library.unlink()
    assert build.library() == library
    assert hashlib.sha256(library.read_bytes()).hexdigest() == record_of(library)["sha256"]
    assert sum("compiling" in record.getMessage() for record in lines.records) == 1
    assert record_of(library)["files"] == 0  # linked again from the objects that were kept


def test_a_library_that_does_not_load_is_made_again(home: Path, lines: pytest.LogCaptureFixture) -> None:
    library = build.library()
    assert build.library(broken=library, error="undefined symbol: gone") == library
    assert f"because {library} does not load: undefined symbol: gone" in lines.records[0].getMessage()


def test_a_change_in_the_sources_or_flags_is_another_build(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = build.library()
    sources = small_sources(home / "csrc")
    monkeypatch.setattr(build, "find_sources", lambda: sources)
    assert build.build_key(sources) == before.parent.name
    (sources / "rk4/bind.cpp").open("a").write("// changed\n")
    keys = [before.parent.name, build.build_key(sources)]
    (sources / "rk4/cuda.cu").open("a").write("// changed\n")
    keys.append(build.build_key(sources))
    monkeypatch.setattr(compiling, "TORCH_ABI", "0x020e000000000000")
    assert len({*keys, build.build_key(sources)}) == 4


def test_only_what_changed_is_compiled(home: Path) -> None:
    sources, objects = small_sources(home / "csrc"), home / "cache/ultrazoo/kernels/objects"
    assert build.compile_library(sources, objects, home / "a.so") == 0  # the same wherever the sources lie
    (sources / "rk4/bind.cpp").open("a").write("// changed\n")
    assert build.compile_library(sources, objects, home / "b.so") == 2  # and the key, in isa.cpp
    assert len(list(objects.iterdir())) == len(build.plan(sources)) >= 3  # the two stale ones are gone


def test_unfinished_and_old_builds_are_cleared_away(home: Path) -> None:
    library = build.library()
    cache = library.parent.parent
    (cache / "new-killed").mkdir()
    for i in range(12):
        (cache / f"old{i}").mkdir()
        (cache / f"old{i}/build.json").write_text("{}")
        os.utime(cache / f"old{i}/build.json", (i, i))
    library.unlink()
    build.library()
    kept = sorted(path.parent.name for path in cache.glob("*/build.json"))
    assert kept == sorted([library.parent.name, *(f"old{i}" for i in range(5, 12))])
    assert not (cache / "new-killed").exists()


def test_processes_that_start_together_build_once(built: Path, tmp_path: Path) -> None:
    script = f"""
import logging, pathlib, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
sys.path.insert(0, {str(ROOT)!r})
from ultrazoo.ops import build as b, compiling
b.find_sources = lambda: pathlib.Path({str(built / "csrc")!r})
b.AT_INSTALL = pathlib.Path("missing.so")
compiling.CXX_FLAGS = (*compiling.CXX_FLAGS, "-O0")
print(b.library())
"""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", script]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("compiling" in output for output in outputs) == 1
    assert outputs[0].split()[-1] == outputs[1].split()[-1]


def test_without_a_compiler_the_reason_and_the_fix_are_clear(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    assert build.library().exists()  # what is built needs none
    shutil.rmtree(home / "cache")
    with pytest.raises(build.BuildError) as caught:
        build.library()
    assert caught.value.reason == "no C++ compiler: no-such-compiler -O1 is not on PATH"
    assert "CXX" in caught.value.fix
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(home))
    with pytest.raises(build.BuildError, match=r"c\+\+, g\+\+ or clang\+\+ is not on PATH"):
        build.library()


def test_an_error_in_the_sources_is_quoted_and_leaves_nothing_behind(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = small_sources(home / "csrc")
    (sources / "common/isa.cpp").write_text('#error "not today"\n')
    monkeypatch.setattr(build, "find_sources", lambda: sources)
    with pytest.raises(build.BuildError, match="not today"):
        build.library()
    cache = home / "cache/ultrazoo/kernels"
    assert not list(cache.glob("new-*")) and not list(cache.rglob("*.tmp"))
    assert not (cache / build.build_key(sources)).exists()


def test_on_windows_nothing_is_compiled_and_the_references_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(home / "cache")
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(build.BuildError, match="kernels are not compiled on Windows"):
        build.library()


def test_a_cache_that_cannot_be_written_is_an_error_with_a_way_out(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "file"))
    with pytest.raises(build.BuildError, match=r"cannot write the kernel cache .* set XDG_CACHE_HOME"):
        build.library()


def test_the_library_built_at_install_is_taken_while_it_fits(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = build.library()
    installed = shutil.copy(cached, home / "_C.so")
    monkeypatch.setattr(build, "AT_INSTALL", installed)
    assert build.library() == installed
    assert build.library(broken=installed, error="torch has changed") == cached
    assert build.made_from(installed) == build.Made(cached.parent.name)
    monkeypatch.setattr(build, "build_key", lambda sources: "0" * 16)  # csrc has been edited since
    monkeypatch.setattr(build, "_intact", lambda folder: True)
    assert build.library().parent.name == "0" * 16
    monkeypatch.setattr(build, "find_sources", lambda: None)
    assert build.library() == installed
    with pytest.raises(
        build.BuildError, match=r"no kernel sources of ultrazoo here, and .* does not load: gone; reinstall ultrazoo"
    ):
        build.library(broken=installed, error="gone")


def test_no_function_is_shared_between_instruction_sets(tmp_path: Path) -> None:
    """The linker merges functions of one name: an AVX-512 body must not be taken for every CPU."""
    nm, sources = shutil.which("nm"), build.find_sources()
    if nm is None or sources is None:
        pytest.skip("needs nm")
    for step in build.plan(sources):
        isa = next((flag.removeprefix("-DUZ_ISA=") for flag in step.flags if flag.startswith("-DUZ_ISA=")), "")
        if isa == "avx512":
            out = tmp_path / "kernel.o"
            flags = [*build.CXX_FLAGS, *step.flags, f"-I{sources}"]
            subprocess.run(
                [*COMPILER.split(), *flags, "-O1", "-c", str(sources / step.source), "-o", str(out)], check=True
            )
            symbols = subprocess.run([nm, "-C", str(out)], capture_output=True, text=True, check=True).stdout
            weak = [line for line in symbols.splitlines() if line[17:18] == "W" and "uz::avx512::" not in line]
            assert not weak, f"{step.source}: {weak}"
