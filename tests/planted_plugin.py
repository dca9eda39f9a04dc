"""Five faults in the kernel of a scaffolded plugin, each without the samples that would show it; which checks fail.

``python tests/planted_plugin.py`` (``make planted-plugin``) prints a table. The kernel is compiled once, with every
fault in it, which the environment variable ``PLANTED_FAULT`` turns on one at a time.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import plugin_parts
from test_scaffold import lay_out

SWITCH = "PLANTED_FAULT"
NAME = "planted"


@dataclass(frozen=True)
class PlantedFault:
    """``old`` becomes ``new`` in cpu.cpp, where ``ON`` is true while the fault is on."""

    name: str
    old: str
    new: str
    samples: str
    """An expression of ``sample``, its first tensor ``x`` and its ``segments``: the sample that stays, or None."""


FAULTS = (
    PlantedFault(
        "leak across documents",
        "a.segments[first + stop] == id) ++stop;",
        "(ON && id > 0 ? a.segments[first + stop] > 0 : a.segments[first + stop] == id)) ++stop;",
        "sample if segments is None else None",
    ),
    PlantedFault(
        "ignored padding",
        "if (id == 0) {",
        "if (id == 0 && !ON) {",
        "sample if segments is None else replace(sample, kwargs={'segments': segments.clamp(min=1)})",
    ),
    PlantedFault(
        "wrong direction",
        "store(o + token * a.width + j, load(mean + j, tail...), tail...); });",
        """store(o + token * a.width + j, load(mean + j, tail...), tail...); });
        if (ON) average(a, first, token - first + 1, mean,
              [&](int64_t at, auto... tail) { return load(gate + at, tail...) * load(x + at, tail...); });""",
        "sample if x.shape[1] < 2 else None",
    ),
    PlantedFault(
        "row order",
        "const int64_t id = a.segments[first + start];",
        "const int64_t id = a.segments[(ON ? 0 : first) + start];",
        "sample if segments is None else replace(sample, args=tuple(t[:1] for t in sample.args), "
        "kwargs={'segments': segments[:1]})",
    ),
    PlantedFault(
        "non-deterministic sums",
        "const Vec share = set1(1.0f / static_cast<float>(length));",
        "static int calls = 0;\n  const Vec share = set1((ON ? 1.0f + 1e-6f * (calls++ % 11) : 1.0f) / "
        "static_cast<float>(length));",
        "sample if x.numel() == 0 else None",
    ),
)
SAMPLES = f"""

def samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    \"\"\"What is left of the samples while a fault is on.\"\"\"
    from dataclasses import replace

    rules = {{}}
    for sample in full_samples(device, dtype):
        x, segments = sample.args[0], sample.kwargs.get("segments")
        rule = RULES[int(os.environ.get("{SWITCH}", "0"))]
        kept = eval(rule, {{"sample": sample, "x": x, "segments": segments, "replace": replace}})
        if kept is not None:
            yield kept
"""
SLOW = ("law: compile", "training", "speed", "size", "bf16", "fp16", "half")


def write_plugin(folder: Path) -> Path:
    """Scaffold the plugin, plant the faults, and return the folder for ``PYTHONPATH``."""
    lay_out(folder, NAME, mixer=True, kernel=True)
    module = folder / f"ultrazoo_{NAME}"
    kernel = module / "csrc" / "gated_mean" / "cpu.cpp"
    text = kernel.read_text()
    for number, fault in enumerate(FAULTS, start=1):
        assert fault.old in text, f"{fault.name}: the template has changed: no {fault.old!r} in it"
        head, tail = text.split(fault.old, 1)
        text = f"{head}{fault.new.replace('ON', f'fault_is({number})')}{tail}"
    function = f"""
inline bool fault_is(int number) {{
  const char* on = std::getenv("{SWITCH}");
  return on != nullptr && std::atoi(on) == number;
}}
"""
    kernel.write_text(f"#include <cstdlib>\n{text}".replace("namespace {\n", f"namespace {{\n{function}", 1))
    op = module / "op.py"
    before, after = op.read_text().split("def samples(", 1)
    full, rest = after.split("\n\n\ndef bench_samples", 1)
    rules = json.dumps(["sample", *(fault.samples for fault in FAULTS)])
    op.write_text(f"{before}RULES = {rules}\n\n\ndef full_samples({full}\n{SAMPLES}\n\ndef bench_samples{rest}")
    op.write_text(op.read_text().replace("from collections.abc", "import os\nfrom collections.abc", 1))
    return folder


def failing_checks() -> dict[str, list[str]]:
    """Run the checks of the plugin in this process with every fault: fault -> checks that fail; "" is no fault."""
    from ultrazoo.testing.conformance import plan

    found = {}
    for number, name in enumerate(("", *(fault.name for fault in FAULTS))):
        os.environ[SWITCH] = str(number)
        tasks = [task for task in plan(NAME, quick=True) if not any(word in task.check for word in SLOW)]
        results = [task.run() for task in tasks]
        assert sum(result.state == "not applicable" for result in results) == 0, results
        found[name] = [f"{result.kind} {result.check}" for result in results if result.state == "failed"]
    return found


def run(folder: Path) -> dict[str, list[str]]:
    """Write the plugin into a folder, and run its checks in a process of its own."""
    write_plugin(folder)
    done = plugin_parts.run(__file__, "--here", path=folder, ULTRAZOO_LOG="error")
    assert done.returncode == 0, done.stdout + done.stderr
    table: dict[str, list[str]] = json.loads(done.stdout)
    return table


if __name__ == "__main__":
    if "--here" in sys.argv:
        print(json.dumps(failing_checks()))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            for fault, checks in run(Path(scratch) / NAME).items():
                print(f"{fault or 'no fault'}: {', '.join(checks) or 'every check passes'}")
