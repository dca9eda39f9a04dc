"""A plugin's ops with kernels of its own: built, loaded, proved, and done without, like ultrazoo's."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import plugin_sources
import pytest
import torch

from ultrazoo.errors import PluginError
from ultrazoo.ops import OpLibrary, build, compiling, kernel_policy, kernel_status, library, loader
from ultrazoo.testing.model_parity import with_kernels

try:
    build.find_compiler()
except build.BuildError as error:
    pytest.skip(error.reason, allow_module_level=True)

CPU = torch.device("cpu")
TWO = """
import torch, ultrazoo_demo, ultrazoo_other
from ultrazoo.ops import kernel_status, loader
x, y = torch.randn(50, requires_grad=True), torch.randn(50)
demo = ultrazoo_demo.scale_add(x, y, 2.0)
best = loader.cpu_isa("demo")
with loader.use_cpu_isa("portable", "demo"):
    other = ultrazoo_other.scale_add(x, y, 2.0)  # is loaded here
    assert {loader.cpu_isa("demo"), loader.cpu_isa("other")} == {"portable"}
    assert torch.equal(ultrazoo_demo.scale_add(x, y, 2.0).signbit(), demo.signbit())
assert {loader.cpu_isa("demo"), loader.cpu_isa("other")} == {best}
assert torch.allclose(demo, 2 * x + y) and torch.allclose(other, 2 * x - y)
(demo.sum() + other.sum()).backward()
assert torch.equal(x.grad, torch.full((50,), 4.0))
for name in ("demo", "other"):
    status = kernel_status(f"{name}::scale_add", "cpu")
    assert status.compiled and status.backward_compiled and f"kernels-{name}" in status.detail, status
"""
CALL = """
import torch, ultrazoo_demo
x = torch.randn(5, requires_grad=True)
for _ in range(2):
    ultrazoo_demo.scale_add(x, x, 2.0).sum().backward()
assert torch.equal(x.grad, torch.full((5,), 6.0))
"""
PARITY = """
from ultrazoo.cli import main
from ultrazoo.ops import loader
try:
    sys.argv = ["ultrazoo", "parity", "demo::scale_add", "--dtype", "float32", "--dtype", "float16", "--json"]
    main()
except SystemExit as end:
    assert not end.code, end.code
finally:
    assert set(loader._loaded) == {"demo"}
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two installed plugins, whose C++ has the same names but not the same meaning, and the cache that they fill."""
    site = tmp_path_factory.mktemp("site")
    plugin_sources.install(site, "demo", "+")
    plugin_sources.install(site, "other", "-")
    plugin_sources.run(site, site / "cache", TWO)
    return site


@pytest.fixture
def mine(site: Path, tmp_path: Path) -> Path:
    """A copy of all that."""
    shutil.copytree(site, tmp_path / "site")
    return tmp_path / "site"


def test_a_second_process_takes_both_libraries_as_they_are(site: Path) -> None:
    said = plugin_sources.run(site, site / "cache", TWO)
    assert "compiling" not in said and said.count("runs compiled") == 2
    assert {path.name for path in (site / "cache/ultrazoo").iterdir()} == {"kernels-demo", "kernels-other"}


def test_parity_proves_every_backend_of_the_op(site: Path) -> None:
    said = plugin_sources.run(site, site / "cache", PARITY, ULTRAZOO_LOG="ERROR")
    found = json.loads(said[said.index("{") :])
    assert found["failed"] == 0 and {check["subject"] for check in found["checks"]} == {"demo::scale_add"}
    runs = {(check["backend"], check["isa"], check["dtype"]) for check in found["checks"]}
    assert {
        ("compiled", "portable", "float32"),
        ("compiled", "portable", "float16"),
        ("reference", "", "float32"),
    } <= runs
    assert {"forward", "gradient of x", "gradient of y", "opcheck"} <= {check["check"] for check in found["checks"]}


def test_a_library_exports_nothing_that_another_could_take(site: Path) -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("needs nm")
    (path,) = (site / "cache/ultrazoo/kernels-demo").glob("*/library.so")
    said = subprocess.run([nm, "-D", "--defined-only", str(path)], capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1] for line in said.splitlines()}
    of_c = {name for name in names if not name.startswith("_")}
    assert of_c == {"ultrazoo_build_key", "ultrazoo_cpu_isa", "ultrazoo_set_cpu_isa"}
    assert not [name for name in names if name.startswith(("_ZN2uz", "_ZNK2uz"))]


@pytest.mark.parametrize("damage", ["torn", "not a library"])
def test_a_damaged_library_is_made_again(mine: Path, damage: str) -> None:
    (path,) = (mine / "cache/ultrazoo/kernels-demo").glob("*/library.so")
    if damage == "torn":
        path.write_bytes(path.read_bytes()[:5000])
    else:  # of another machine, say: whole, but it does not load
        path.write_bytes(b"no library")
        (path.parent / "build.json").write_text(json.dumps({"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}))
    said = plugin_sources.run(mine, mine / "cache", CALL)
    assert said.count("compiling") == 1 and "demo::scale_add on cpu runs compiled" in said


def test_sources_that_do_not_compile_leave_the_references_and_the_other_plugin(mine: Path) -> None:
    (mine / "ultrazoo_demo/csrc/shared/term.h").write_text('#error "not today"\n')
    said = plugin_sources.run(
        mine, mine / "cache", CALL + TWO.partition("demo = ")[0] + "ultrazoo_other.scale_add(x, y, 1.0)"
    )
    (warning,) = [line for line in said.splitlines() if line.startswith("WARNING")]
    assert warning.startswith("WARNING kernels: every op of demo runs its reference: ")
    assert "not today" in warning and str(mine / "ultrazoo_demo/csrc/scale_add/cpu.cpp") in warning
    log = mine / "cache/ultrazoo/kernels-demo/errors.txt"
    assert str(log) in warning and "term.h:1:2" in log.read_text()
    assert "other::scale_add on cpu runs compiled" in said


def test_kernels_for_another_namespace_are_refused(mine: Path) -> None:
    binding = mine / "ultrazoo_demo/csrc/scale_add/bind.cpp"
    binding.write_text(binding.read_text().replace("IMPL(demo", "IMPL(other"))
    said = plugin_sources.run(mine, mine / "cache", CALL)
    assert f"{binding} registers kernels for other::; register them for demo::" in said


def test_a_header_of_the_plugin_concerns_only_what_includes_it(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "CXX_FLAGS", (*compiling.CXX_FLAGS, "-O0"))
    sources, objects = mine / "ultrazoo_demo/csrc", mine / "cache/ultrazoo/kernels-demo/objects"
    before, steps = compiling.build_key(sources), compiling.plan(sources)
    assert compiling.compile_library(sources, objects, mine / "a.so") == 0  # wherever the sources lie
    (sources / "shared/term.h").open("a").write("// changed\n")
    assert compiling.build_key(sources) != before
    kernels = sum(step.source == "scale_add/cpu.cpp" for step in steps)
    assert compiling.compile_library(sources, objects, mine / "b.so") == kernels + 1  # and the key, but not bind.cpp


def test_the_headers_are_those_of_the_installed_package(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = compiling.find_sources()
    assert ours is not None
    shutil.copytree(ours / "common", tmp_path / "ultrazoo/csrc/common")
    monkeypatch.setattr(compiling, "PACKAGE", tmp_path / "ultrazoo")
    sources = mine / "ultrazoo_demo/csrc"
    assert compiling.common_of(sources) == tmp_path / "ultrazoo/csrc"
    before = compiling.build_key(sources)
    (tmp_path / "ultrazoo/csrc/common/simd.h").open("a").write("// changed\n")
    assert compiling.build_key(sources) != before  # another ultrazoo, another build
    (sources / "common").mkdir()
    with pytest.raises(build.BuildError, match="hides ultrazoo's own headers; give that folder another name"):
        compiling.common_of(sources)


def test_the_folder_of_an_op_asks_for_vnni(mine: Path) -> None:
    sources, header = mine / "ultrazoo_demo/csrc", mine / "ultrazoo_demo/csrc/scale_add/kernels.h"
    assert not compiling.has_vnni(sources / "scale_add")
    header.write_text(header.read_text().replace("UZ_KERNELS(", "UZ_KERNELS_VNNI("))
    flags = [flag for step in compiling.plan(sources) for flag in step.flags]
    assert ("-mavx512vnni" in flags) == ("-mavx2" in flags)
    assert compiling.folders_of(sources, "scale_add") == [sources / "scale_add"]
    ours = compiling.find_sources()
    assert ours is not None and compiling.folders_of(ours, "bitlinear_packed") == [ours / "bitlinear"]
    assert [folder.name for folder in ours.iterdir() if compiling.has_vnni(folder)] == ["bitlinear"]


def test_a_namespace_has_one_owner() -> None:
    with pytest.raises(
        PluginError, match=r"'ultrazoo' belongs to ultrazoo .*ops.library\); module test_plugin_kernels"
    ):
        OpLibrary("ultrazoo")
    with pytest.raises(PluginError, match="'aten' has ops of another library"):
        OpLibrary("aten")
    with pytest.raises(PluginError, match="got 'my-ops', expected small letters"):
        OpLibrary("my-ops")


def test_an_op_library_without_sources_is_whole(caplog: pytest.LogCaptureFixture) -> None:
    plain = OpLibrary("test_plain_ops")
    op = plain.define("scaled(Tensor x) -> Tensor", lambda x: 2 * x, fake=torch.empty_like)
    assert torch.equal(op(torch.ones(2)), torch.full((2,), 2.0))
    with pytest.raises(PluginError, match=r"a second time in this process.*start Python again"):
        OpLibrary("test_plain_ops")
    assert library.libraries()["test_plain_ops"] is plain and library.library_of("test_plain_ops::scaled") is plain
    status = kernel_status("test_plain_ops::scaled", "cpu")
    assert not status.compiled and status.detail == "test_plain_ops has no compiled kernels"
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert with_kernels(["test_plain_ops::scaled", "foreign::op"], CPU) == []  # nothing to prove a model by
    with pytest.raises(PluginError, match="expected a name without namespace"):
        plain.define("aten::foo(Tensor x) -> Tensor", torch.neg, fake=torch.empty_like)
    with kernel_policy("compiled"), pytest.raises(library.KernelUnavailableError, match="has no compiled kernels"):
        op(torch.ones(2))
    plain.forget()
    assert "test_plain_ops" not in library.libraries() and library.library_of("test_plain_ops::scaled") is None


def test_sources_that_are_not_there_name_the_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_loaded", {})
    lost = OpLibrary("test_lost_ops", sources=tmp_path / "csrc")
    lost.define("same(Tensor x) -> Tensor", torch.clone, fake=torch.empty_like)
    status = kernel_status("test_lost_ops::same", "cpu")
    lost.forget()
    assert status.detail == "there are no kernel sources of test_lost_ops here, and none was compiled at install"
    assert status.fix == "reinstall the plugin that has the ops test_lost_ops::"
