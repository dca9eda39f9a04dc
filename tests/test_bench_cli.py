"""``ultrazoo bench``: what is printed, what is written, how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bench_parts import double, rows_of, spec_of
from cli_parts import call, write_config

from ultrazoo.bench import ops, run
from ultrazoo.bench.blocks import block_ways
from ultrazoo.bench.records import append_rows, read_rows
from ultrazoo.ops import loader
from ultrazoo.ops.library import KernelStatus
from ultrazoo.plugins import Plugin
from ultrazoo.registry import Registry, registry
from ultrazoo.spec import OpSpec

FAST = ("--threads", "1", "--seconds", "0")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is built for these tests."""
    monkeypatch.setattr(loader, "load", lambda *_: loader.Loaded(reason="not needed here", fix="none"))


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> OpSpec:
    """A plugin's op, beside everything that is installed; and a wrong one."""
    good, bad = spec_of(lambda x: x + x), spec_of(lambda x: 2.001 * x, "test_bench::wrong")
    plugin = Plugin(name="toy", distribution="toy", version="1", module="toy", ops=(good, bad))
    zoo = Registry([plugin, *registry().plugins])
    monkeypatch.setattr(run, "registry", lambda: zoo)
    return good


def test_an_op_is_timed_written_and_drawn(toy: OpSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, drawing = tmp_path / "rows.jsonl", tmp_path / "chart.png"
    threads = torch.get_num_threads()
    assert call("bench", "double", *FAST, "--output", rows, "--plot", drawing) == 0
    printed = capsys.readouterr()
    assert "test_bench::double: forward, float32" in printed.out and "GFLOP/s" in printed.out
    assert "parity: test_bench::double (op, float32): 4 checks hold" in printed.err
    found = read_rows(rows)
    assert [(row.sample, row.backend) for row in found] == [
        (f"B2 D3 L{length}", backend) for length in (8, 16) for backend in ("op", "reference", "add")
    ]
    assert all(row.q1_s <= row.median_s <= row.q3_s and row.threads == 1 and row.rounds >= 3 for row in found)
    assert all(row.gemm_gflops > 0 and row.copy_gbytes > 0 for row in found)
    assert drawing.read_bytes().startswith(PNG) and drawing.stat().st_size > 10_000
    assert torch.get_num_threads() == threads


def test_json_has_machine_verdicts_and_rows(toy: OpSpec, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--json", "--sweep", "8..32", "--backend", "op,add", "--backward", "--dtype", "bfloat16", "--cpu-time")
    assert call("bench", "test_bench::double", *FAST, *options) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["length"], row["backend"]) for row in found["rows"]] == [
        (length, backend) for length in (8, 16, 32) for backend in ("op", "add")
    ]
    row = found["rows"][0]
    assert (row["schema_version"], row["direction"], row["dtype"]) == (1, "forward + backward", "bfloat16")
    assert (row["clock"], row["flops"], row["tokens"]) == ("cpu", 3 * 48, 16)
    assert found["machine"]["threads"] == 1 and all(check["ok"] for check in found["parity"])
    assert {crossing["fast"] for crossing in found["crossings"]} <= {"op", "add"}


def test_a_wrong_op_is_refused_with_exit_3(toy: OpSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    assert call("bench", "wrong", *FAST, "--output", rows) == 3
    printed = capsys.readouterr()
    assert "not timed" in printed.err and "forward: error" in printed.err
    assert not rows.exists() and not printed.out


def ways_of_attention() -> list[str]:
    """With and without its kernel, which another test of this process may have loaded."""
    return list(block_ways([registry().op("ultrazoo::attention")], torch.device("cpu")))


def test_a_block_is_timed_against_standard_attention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawing = tmp_path / "chart.png"
    sizes = ("--sweep", "8,24", "--hidden-size", "32", "--batch", "2", "--plot", drawing, "--backward")
    assert call("bench", "sigmoid_attn", *FAST, *sizes) == 0
    table = capsys.readouterr().out
    assert "sigmoid_attn: D32 H1, forward + backward, float32" in table
    header = next(line for line in table.splitlines() if line.startswith(" L"))
    assert header.split() == ["L", "B", *ways_of_attention(), "standard_attn", "MiB"]
    assert drawing.read_bytes().startswith(PNG)


@pytest.mark.parametrize("name", ["rms_norm", "moe"])
def test_norms_and_feed_forwards_are_blocks_too(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("bench", name, *FAST, "--length", "8", "--hidden-size", "32", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["name"], row["backend"], row["tokens"]) == (name, "torch", 2048)


def test_a_model_is_timed_by_its_training_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path)
    assert call("bench", config, *FAST, "--sweep", "8..16", "--batch", "2", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    ways = ways_of_attention() if "compiled" in ways_of_attention() else ["torch"]  # which a model takes by itself
    assert [(row["name"], row["direction"], row["tokens"], row["backend"]) for row in rows] == [
        ("tiny", "training step", tokens, way) for tokens in (16, 32) for way in ways
    ]


def test_compare_prints_ratios_and_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after, other = (tmp_path / f"{name}.jsonl" for name in ("before", "after", "other"))
    append_rows(before, rows_of({"compiled": [1, 1], "sdpa": [2, 2]}))
    append_rows(after, rows_of({"compiled": [0.5, 0.95]}))
    append_rows(other, rows_of({"compiled": [1]}, name="another"))
    assert call("bench", "compare", before, after) == 0
    printed = capsys.readouterr()
    lines = [line.split() for line in printed.out.splitlines() if "compiled" in line]
    assert [(line[-1], line[-3]) for line in lines] == [("faster", "0.50"), ("spread", "within")]
    assert f"2 rows are in {before} alone" in printed.err.replace("\n", " ")
    assert call("bench", "compare", before, after, "--json") == 0
    assert [change["verdict"] for change in json.loads(capsys.readouterr().out)] == ["faster", "within the spread"]
    assert call("bench", "compare", before, other) == 1
    assert call("bench", "compare", before, tmp_path / "absent.jsonl") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("retnt",), "did you mean 'retnet'"),
        ((), "Missing argument"),
        (("retnet", "--dtype", "float8"), "float8"),
        (("retnet", "--sweep", "64..32"), "shorter length first"),
        (("retnet", "--sweep", "0..32"), "expected FIRST..LAST"),
        (("retnet", "--sweep", "8..16", "--length", "8"), "expected one of them"),
        (("retnet", "--length", "8", "--plot", "chart.png"), "at least two"),
        (("rk4_stage", "--plot", "chart.png"), "at least two"),
        (("retnet", "--output", "absent/rows.jsonl"), "make it first"),
        (("retention", "--hidden-size", "32"), "--hidden-size"),
        (("embbert", "--hidden-size", "32"), "whose width is its own"),
        (("embbert", "--backward"), "training step"),
        (("rk4_stage", "--sweep", "8..16"), "no length"),
        (("rms_norm", "--backend", "compiled"), "--backend"),
    ],
)
def test_a_wrong_call_ends_with_2(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert call("bench", *arguments) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_compiled_kernels_that_are_not_there_are_an_error_only_if_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = KernelStatus(
        op="x::y", device="cpu", compiled=False, backward_compiled=None, detail="no compiler", fix="install g++"
    )
    monkeypatch.setattr(ops, "kernel_of", lambda spec, device: absent)
    monkeypatch.setattr(ops, "require_parity", lambda *given: [])
    zoo = Registry([Plugin(name="t", distribution="t", version="1", module="toy", ops=(spec_of(double),))])
    monkeypatch.setattr(run, "registry", lambda: zoo)
    assert call("bench", "double", *FAST, "--backend", "compiled") == 1
    assert "no compiler; install g++" in capsys.readouterr().err
    assert call("bench", "double", *FAST, "--length", "8") == 0
    assert "timed without it" in capsys.readouterr().err
