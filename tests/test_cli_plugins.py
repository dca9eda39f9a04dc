"""``ultrazoo plugins``: what each offers, on what its ops run, and what the last check said."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cli_parts import call
from plugin_parts import Entry, block, install, load, module_with, op, zoo

import ultrazoo
from ultrazoo.registry import Registry
from ultrazoo.verdicts import verdict_path

Capture = pytest.CaptureFixture[str]
OPS = """
from pathlib import Path
from dataclasses import replace
import torch
from ultrazoo import hookimpl
from ultrazoo.ops import OpLibrary
from ultrazoo.ops.attention.op import SPECS

ULTRAZOO_PLUGIN_API = 1
library = OpLibrary("{name}", sources={sources})
double = library.define("double(Tensor x) -> Tensor", lambda x: x + x, fake=torch.empty_like)

@hookimpl
def ultrazoo_ops():
    return [replace(SPECS[0], name="{name}::double", op=double, reference=lambda x: x + x, differentiable=False)]
"""
PREBUILT = """
import torch
from pathlib import Path
torch.ops.load_library(str(Path(__file__).with_name("{file}")))
"""


@pytest.fixture
def zoo_of_three(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Registry:
    """One plugin that works, one that is broken and one that is disabled; no check was made."""
    good = module_with(ultrazoo_blocks=lambda: [block("hyena")], ultrazoo_ops=lambda: [op("good::scan")])
    bad = Entry("bad", "zoo-bad", ImportError("no torch"))
    found = load(monkeypatch, Entry("good", "zoo-good", good), bad, Entry("off", "zoo-off", good), disable="off")
    registry = Registry(list(found.values()))
    monkeypatch.setattr("ultrazoo.registry.registry", lambda: registry)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return registry


def test_every_plugin_has_its_state(zoo_of_three: Registry, capsys: Capture) -> None:
    assert call("plugins") == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in out.split("Offers")[0].splitlines() if line.strip()}
    assert rows["core"][:4] == ["core", "ultrazoo", ultrazoo.__version__, "1"]
    assert rows["bad"][:5] == ["bad", "zoo-bad", "1.2", "-", "broken"]
    assert rows["off"][:5] == ["off", "zoo-off", "1.2", "-", "disabled"]
    assert "good::scan" in out and "hyena" in out and out.count("not checked") == 4
    assert re.search(
        r"left out  zoo-bad 1.2 \(plugin 'bad'\)  ImportError: no torch .*; update or uninstall zoo-bad", out
    )
    assert call("plugins", "--json") == 0
    facts = {plugin["name"]: plugin for plugin in json.loads(capsys.readouterr().out)}
    assert facts["good"]["blocks"] == ["hyena"] and facts["good"]["kernels"] is None
    assert facts["off"]["disabled"] and facts["bad"]["error"] and facts["good"]["check"] == {"state": "not checked"}


@pytest.mark.parametrize(
    ("verdict", "shown"),
    [
        ({"passed": True, "checks": 31, "failed": 0}, "passed 31 checks, 2026-01-02"),
        ({"passed": False, "checks": 31, "failed": 2}, "FAILED 2 of 31 checks, 2026-01-02"),
        ({"passed": True, "version": "1.1"}, f"stale: made for 1.1 with ultrazoo {ultrazoo.__version__}"),
        ({"passed": True, "ultrazoo": "0.0.1"}, "stale: made for 1.2 with ultrazoo 0.0.1"),
        (None, "unreadable: "),
    ],
)
def test_the_verdict_of_the_last_check_is_shown(
    verdict: dict[str, object] | None, shown: str, zoo_of_three: Registry, capsys: Capture
) -> None:
    whole = {"plugin": "good", "version": "1.2", "ultrazoo": ultrazoo.__version__, "when": "2026-01-02"}
    path = verdict_path("good")
    path.parent.mkdir(parents=True)
    path.write_text("{" if verdict is None else json.dumps({**whole, **verdict}))
    assert call("plugins") == 0
    assert shown in capsys.readouterr().out


def test_clashes_are_told(zoo_of_three: Registry, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    again = next(plugin for plugin in zoo_of_three.plugins if plugin.name == "good")
    both = Registry([*zoo_of_three.plugins, again])
    monkeypatch.setattr("ultrazoo.registry.registry", lambda: both)
    assert call("plugins") == 0
    assert "block 'hyena' is offered by zoo-good 1.2" in capsys.readouterr().out


def test_an_op_without_its_kernels_says_why_and_the_rest_goes_on(tmp_path: Path) -> None:
    (tmp_path / "csrc" / "double").mkdir(parents=True)
    (tmp_path / "csrc" / "double" / "bind.cpp").write_text("#error not reached\n")
    install(tmp_path, "one", source=OPS.format(name="shared", sources=None))
    install(tmp_path, "two", source=OPS.format(name="shared", sources=None))
    install(tmp_path, "alpha", source=OPS.format(name="alpha", sources=None))
    install(tmp_path, "beta", source=OPS.format(name="beta", sources='Path(__file__).with_name("csrc")'))
    install(tmp_path, "gamma", source=PREBUILT.format(file="absent.so"))
    install(tmp_path, "delta", source=PREBUILT.format(file="other.so"))
    if (compiler := shutil.which("cc")) is not None:
        (tmp_path / "other.c").write_text("int absent(void); int present(void) { return absent(); }\n")
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-Wl,-z,now", "other.c", "-o", "other.so"], cwd=tmp_path, check=True
        )
    else:
        (tmp_path / "other.so").write_text("no library\n")
    environment = {"CXX": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = zoo("plugins", "--kernels", "--json", path=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    found = {plugin["name"]: plugin for plugin in json.loads(done.stdout)}
    (alpha,), (beta,) = (found[name]["kernels"] for name in ("alpha", "beta"))
    assert alpha["op"] == "alpha::double" and alpha["compiled"] is False
    assert alpha["detail"] == "alpha has no compiled kernels"
    assert beta["compiled"] is False and "no-such-compiler" in beta["detail"] and beta["fix"]
    assert "absent.so" in found["gamma"]["error"] and "ultrazoo-gamma 0.3" in found["gamma"]["error"]
    assert "other.so" in found["delta"]["error"] and "uninstall ultrazoo-delta" in found["delta"]["error"]
    assert found["core"]["error"] is None and len(found["core"]["kernels"]) >= 6
    assert found["one"]["error"] is None
    reason = "plugin 'two' of ultrazoo-two 0.3 is left out: PluginError: op namespace 'shared' belongs to"
    assert reason in found["two"]["error"]
