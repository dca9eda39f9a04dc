"""The conformance kit: it passes what is sound, names the fault of what is not, and reports it in every form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import faulty_plugin
import plugin_parts
import pytest
import torch
from cli_parts import call

import ultrazoo
from ultrazoo import registry as registry_module
from ultrazoo.cli.plugins import last_check
from ultrazoo.errors import ConfigError, UnknownNameError
from ultrazoo.ops import kernel_policy, kernel_status
from ultrazoo.ops.library import KernelStatus
from ultrazoo.plugins import Plugin
from ultrazoo.registry import Registry, registry
from ultrazoo.spec import BlockSpec, PresetSpec
from ultrazoo.testing import conformance_parts, conformance_tests, kernel_laws, model_parity
from ultrazoo.testing.conformance import ConformanceFailure, Result, plan
from ultrazoo.testing.conformance_result import bounded
from ultrazoo.testing.laws import LAWS
from ultrazoo.verdicts import verdict_path

SLOW = ("law: compile", "speed: against attention")
SPECS = {spec.name: spec for spec in faulty_plugin.SPECS}


def plugin(name: str, blocks: tuple[BlockSpec, ...] = (), **changes: object) -> Plugin:
    values = {
        "distribution": f"ultrazoo-{name}",
        "version": "1.2",
        "module": "m",
        "api": 1,
        "blocks": blocks,
        **changes,
    }
    return Plugin(name=name, **values)  # type: ignore[arg-type]


def use(monkeypatch: pytest.MonkeyPatch, *plugins: Plugin) -> None:
    zoo = Registry([*registry().plugins, *plugins])
    monkeypatch.setattr(registry_module, "_load", lambda: zoo)


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, plugin("faulty", tuple(faulty_plugin.SPECS)))


def broken(target: str, *left_out: str) -> dict[str, Result]:
    """The checks of a block itself that fail."""
    tasks = [task for task in plan(target, quick=True) if task.subject == target]
    results = [task.run() for task in tasks if task.check not in SLOW and task.group not in left_out]
    return {result.check: result for result in results if result.state == "failed"}


EVERYTHING_REPEATS = {"law: padding", "law: packing", "law: batch order", "law: gradients", "law: state", "law: gaps"}


@pytest.mark.usefixtures("faulty")
@pytest.mark.parametrize(
    ("block", "checks"),
    [
        ("leaks", {"law: packing", "law: returning documents", "model: packing"}),
        ("pads", {"law: padding", "law: packing", "law: gaps"}),
        ("mutates", {"law: inputs"}),
        ("random", {*EVERYTHING_REPEATS, "law: determinism", "model: state goes round", "model: packing"}),
        ("narrow", {"law: fp16", "model: half precision"}),
        ("forgets", {"law: state", "model: state goes round"}),
        ("idle", {"ops: are used"}),
        ("retains", set()),
        ("logs", {"law: auxiliary values"}),
        ("batch", {"law: padding", "law: packing", "law: batch order", "law: gaps", "model: packing"}),
    ],
)
def test_a_fault_breaks_its_checks_and_no_other(block: str, checks: set[str]) -> None:
    assert set(broken(block, "training")) == checks


@pytest.mark.usefixtures("faulty")
def test_a_block_without_gradient_cannot_hide_behind_the_rest_of_the_model() -> None:
    found = broken("untrained")
    own = "training: by its own weights"
    assert {"law: gradients", own} <= set(found) and "training: loss falls" not in found
    assert found[own].what == "no gradient reaches any of its 4 weights"


@pytest.mark.usefixtures("faulty")
def test_a_sound_block_passes_all_of_them() -> None:
    tasks = plan("sound", quick=True)
    results = {task.check: task.run() for task in tasks}
    assert [str(r) for r in results.values() if r.state == "failed"] == []
    assert (results["training: loss falls"].measured or 0) > 1
    assert results["speed: against attention"].state == results["size: parameters"].state == "measured"
    assert results["size: parameters"].measured == 384 * 385
    assert len({task.id for task in tasks}) == len(tasks)


@pytest.mark.usefixtures("faulty")
def test_a_kernel_that_is_passed_by_is_told() -> None:
    if not kernel_status("ultrazoo::retention", "cpu").compiled:
        pytest.skip("no compiled kernel to pass by")
    assert (
        "has a compiled kernel and runs its reference"
        in broken("slow", "law", "model", "training")["ops: are used"].what
    )


@pytest.mark.usefixtures("faulty")
def test_what_a_block_raises_fails_its_checks_alone() -> None:
    found = broken("raises")
    assert {"law: padding", "model: packing", "training: loss falls"} <= set(found)
    assert "raised KeyError: 'scan'" in found["model: packing"].what


def test_nan_fails_on_either_side_of_a_limit() -> None:
    assert bounded("x", float("nan"), 1).state == bounded("x", float("nan"), 1, at_least=True).state == "failed"


def test_what_does_not_load_or_fit_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("model: {layer_pattern: [retnett]}\n")
    bad = PresetSpec(name="bad", path=tmp_path / "bad.yaml", summary="")
    use(
        monkeypatch,
        plugin("old", reason="it is written for plugin API 0"),
        plugin("twin", (SPECS["sound"], registry().find_block("retnet")), presets=(bad,)),
        plugin("off", disabled=True),
    )
    (loads,) = plan("old")
    with pytest.raises(ConformanceFailure, match="plugin API 0"):
        loads.hold()
    results = {task.id: task for task in plan("ultrazoo-twin", quick=True)}
    assert "block 'retnet' of ultrazoo-twin 1.2 (plugin 'twin') is skipped" in results["twin-plugin-names"].run().what
    assert "did you mean 'retnet'" in results["bad-preset-builds"].run().what
    with pytest.raises(UnknownNameError, match="did you mean 'mamba'"):
        plan("mambaa")
    with pytest.raises(ConfigError, match="is disabled"):
        plan("off")
    with pytest.raises(ConfigError, match="not part of sound"):
        plan("sound", options={"mlp": {}})
    assert {task.plugin for task in plan("all")} == {"core", "old", "twin"}


def test_a_block_is_built_at_the_first_width_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wide(faulty_plugin.Sound):
        def __init__(self, config: faulty_plugin.Config) -> None:
            if config.hidden_size % 64:
                raise ValueError(f"got hidden_size {config.hidden_size}, expected a multiple of 64")
            super().__init__(config)

    wide = BlockSpec(name="wide", kind="mixer", module=Wide, config=faulty_plugin.Config, paper="", equation="")
    use(monkeypatch, plugin("wide", (wide,)))
    assert broken("wide", "size") == {}
    refused = {t.check: t for t in plan("wide", options={"wide": {"hidden_size": 8}})}["law: padding"].run()
    assert "got hidden_size 8" in refused.what


@pytest.mark.parametrize("block", ["retnet", "moe", "derf"])
def test_what_is_built_in_passes(block: str) -> None:
    assert broken(block) == {}


test_three_lines_hold_a_block = conformance_tests("layer_norm", quick=True)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path


def test_the_command_reports_in_every_form(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = plugin("mine", (SPECS["pads"],))
    use(monkeypatch, mine)
    out, table = cache / "out.json", cache / "badges.md"
    assert call("check", "mine", "--quick", "--json", out, "--markdown", table) == 1
    printed = capsys.readouterr()
    assert "1e-10" in printed.out and "Conformance of mine: 1" in printed.out
    assert "FAILED mixer pads of plugin mine: check 'law: padding' failed" in printed.err
    report = json.loads(out.read_text())
    assert (report["format"], report["passed"], report["quick"]) == (1, False, True)
    assert report["versions"]["plugins"] == {"ultrazoo-mine": "1.2"}
    assert (report["versions"]["torch"], report["versions"]["ultrazoo"]) == (torch.__version__, ultrazoo.__version__)
    assert report["counts"]["failed"] == 3 == sum(result["state"] == "failed" for result in report["results"])
    text = table.read_text()
    laws = f"{len(LAWS) - 3}/{len(LAWS)}"
    assert f"| `pads` (mixer) | **FAIL** {laws} | pass 4/4 | pass 2/2 | 147,840 |" in text
    assert "`ultrazoo check mine --quick`" in text and "://" not in text
    verdict = last_check(mine)
    assert (verdict["state"], verdict["failed"]) == ("failed", 3)
    assert verdict["failures"] == ["pads: law: padding", "pads: law: packing", "pads: law: gaps"]
    assert last_check(plugin("mine", version="1.3"))["state"] == "stale"


def test_a_block_alone_writes_no_verdict(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("check", "derf", "--quick", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["target"] == "derf"
    assert not verdict_path("core").exists()
    assert call("check", "drf") == 2
    assert "did you mean 'derf'" in capsys.readouterr().err


PYTEST = ("-m", "pytest", "-p", "no:cacheprovider", "-p", "ultrazoo.testing.pytest_plugin", "-q", "-rA")


def run_pytest(folder: Path, *arguments: str) -> tuple[int, str]:
    if not (folder / "zoo").exists():
        plugin_parts.install(folder / "zoo", "faulty", source=Path(faulty_plugin.__file__).read_text())
    words = (*PYTEST, "--rootdir", str(folder), str(folder), *arguments)
    done = plugin_parts.run(*words, path=folder / "zoo", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("parallel", [(), ("-p", "xdist", "-n", "2")], ids=["one process", "xdist"])
def test_pytest_collects_a_test_for_each_check(tmp_path: Path, parallel: tuple[str, ...]) -> None:
    code, out = run_pytest(
        tmp_path, "--ultrazoo-blocks=faulty", "--ultrazoo-quick", "-k", "law-padding or loads", *parallel
    )
    assert code == 1, out
    assert "ultrazoo[faulty]::sound-law-padding" in out and "ultrazoo[faulty]::faulty-plugin-loads" in out
    assert "mixer pads of plugin faulty: check 'law: padding' failed\n  " in out
    assert "expected at most 0" in out and "Traceback" not in out and "conformance_result.py" not in out
    assert "4 failed, 14 passed" in out  # three of them on compiled kernels


def test_pytest_refuses_an_unknown_name(tmp_path: Path) -> None:
    code, out = run_pytest(tmp_path, "--ultrazoo-blocks=fulty")
    assert code == 4
    assert "--ultrazoo-blocks: check: unknown name 'fulty'; did you mean 'faulty'?" in out


def test_pytest_is_left_alone_without_the_option(tmp_path: Path) -> None:
    assert {entry.value for entry in entry_points(group="pytest11", name="ultrazoo")} == {
        "ultrazoo.testing.pytest_plugin"
    }
    (tmp_path / "test_other.py").write_text("import sys\ndef test(): assert 'torch' not in sys.modules\n")
    code, out = run_pytest(tmp_path)
    assert code == 0 and "1 passed" in out
    clock = "time.process_time()"
    script = f"import time, pytest; t = {clock}; import ultrazoo.testing.pytest_plugin; print({clock} - t)"
    assert min(float(plugin_parts.run("-c", script).stdout) for _ in range(3)) < 0.15


def test_a_kernel_that_is_not_there_is_a_failure_unless_references_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def without(op: str, device: str) -> KernelStatus:
        return KernelStatus(
            op=op, device=device, compiled=False, backward_compiled=False, detail="no C++ compiler", fix="install g++"
        )

    tasks = {task.check: task for task in plan("ultrazoo::rk4_stage", quick=True)}
    for module in (conformance_parts, kernel_laws, model_parity):
        monkeypatch.setattr(module, "kernel_status", without)
    result = tasks["parity: float32"].run()
    assert (result.state, result.what) == ("failed", "kernel exists: no C++ compiler; install g++")
    checks = {task.check: task for task in plan("retnet", quick=True)}
    assert "no C++ compiler; install g++" in checks["model: a step on kernels"].run().what
    assert checks["compiled law: padding"].run().state == "not applicable"
    with kernel_policy("reference"):
        assert tasks["parity: float32"].run().state == "passed"
        assert checks["model: a step on kernels"].run().state == "not applicable"
