"""Installed plugins in real processes: loaded at first use, once in each, and never when they are left out."""

from __future__ import annotations

import json
from pathlib import Path

from plugin_parts import SOURCE, install, run, zoo

LOUD = "import sys\nsys.stderr.write('imported;')\n" + SOURCE.replace("spec =", "sys.stderr.write('asked;'); spec =")
LAZY = """
import sys, threading
import ultrazoo.config, ultrazoo.model
from ultrazoo.registry import registry
print("-", file=sys.stderr, end="", flush=True)
seen = []
threads = [threading.Thread(target=lambda: seen.append(registry())) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(seen) == 8 and len({id(one) for one in seen}) == 1 and "toy" in seen[0].mixers()
"""
CHILDREN = """
import multiprocessing, sys
from ultrazoo.registry import registry

def names(_):
    return sorted(registry().mixers()), registry() is registry()

def ask(method):
    with multiprocessing.get_context(method).Pool(1) as pool:
        for found, same in pool.map(names, range(3)):
            assert "toy" in found and "retnet" in found and same

if __name__ == "__main__":
    methods = ["fork", "spawn"] if sys.platform == "linux" else ["spawn"]
    ask(methods[0])
    registry()
    for method in methods: ask(method)
    print("fine")
"""
NO_PLUGINS = """
import contextlib, os, sys
from ultrazoo.cli import main
sys.argv = ["ultrazoo", "--no-plugins", "list", "--json"]
with contextlib.suppress(SystemExit):
    main()
print(os.environ["ULTRAZOO_DISABLE_PLUGINS"], file=sys.stderr)
"""

USE = """
import sys
from ultrazoo.config import config_from_dict, json_schema
from ultrazoo.errors import ConfigError
from ultrazoo.model import build_model, parameter_table

def config(*pattern):
    small = {"hidden_size": 32, "num_heads": 4, "num_layers": 3, "ffn_hidden_size": 64, "vocab_size": 300}
    return config_from_dict({"model": {**small, "layer_pattern": pattern}}, "here")

table = parameter_table(build_model(config("toy", "standard_attn", {"block": "toy", "order": 5}).model))
print(*[part for part, _ in table if "order" in part])
_, *uses = json_schema()["definitions"]["ModelConfig"]["properties"]["layer_pattern"]["items"]["anyOf"]
print(*[use["properties"]["order"]["description"] for use in uses if "order" in use["properties"]])
try:
    config("toy", {"block": "toy", "order": 0})
except ConfigError as error:
    print(error, file=sys.stderr)
"""


def test_nothing_is_imported_before_it_is_needed_and_threads_share_one_loading(tmp_path: Path) -> None:
    folder = install(tmp_path, source=LOUD)
    assert "imported" not in zoo("--help", path=folder).stderr
    done = run("-c", LAZY, path=folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "-imported;asked;"


def test_child_processes_have_the_plugins_too(tmp_path: Path) -> None:
    script = tmp_path / "children.py"
    script.write_text(CHILDREN)
    done = run(script, path=install(tmp_path / "site"))
    assert done.returncode == 0 and done.stdout == "fine\n", done.stderr


def test_no_plugins_is_for_the_process_and_its_children(tmp_path: Path) -> None:
    done = run("-c", NO_PLUGINS, path=install(tmp_path, source=LOUD))
    names = {block["name"] for block in json.loads(done.stdout)["blocks"]}
    assert "retnet" in names and "toy" not in names
    assert done.stderr == "all\n"


def test_broken_plugins_do_not_stop_the_command_line(tmp_path: Path) -> None:
    folder = install(tmp_path)
    install(folder, "exit", source="import sys\nsys.exit('goodbye')\n")
    install(folder, "late", source="from ultrazoo.config import ModelConfig\nModelConfig()\n" + SOURCE)
    install(folder, "absent", source="import no_such_package\n")
    done = zoo("plugins", "--json", path=folder, ULTRAZOO_DISABLE_PLUGINS="tow")
    assert done.returncode == 0
    found = {plugin["name"]: plugin for plugin in json.loads(done.stdout)}
    assert found["toy"]["blocks"] == ["toy"] and "retnet" in found["core"]["blocks"]
    for name, reason in {
        "exit": "SystemExit: goodbye",
        "late": "the registry was asked for while plugins load",
        "absent": f"No module named 'no_such_package' ({folder / 'zoo_absent.py'}:1)",
    }.items():
        assert reason in found[name]["error"] and found[name]["blocks"] == []
        assert f"plugin {name!r} of ultrazoo-{name} 0.3 is left out" in done.stderr
    assert "ULTRAZOO_DISABLE_PLUGINS names 'tow', which is no installed plugin; did you mean 'toy'?" in done.stderr


def test_a_plugins_block_takes_options_in_its_layer(tmp_path: Path) -> None:
    done = run("-c", USE, path=install(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "mixer toy order=5 (x 1)\nNumber of matrices.\n"
    assert "model.layer_pattern[1].order: got 0; expected greater than or equal to 1" in done.stderr
