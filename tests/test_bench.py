"""The benchmark's own arithmetic, on a clock that the test moves."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench_parts import CPU, Clock, StillBench, rows_of

from ultrazoo.bench import session
from ultrazoo.bench.compare import compare, notes, unmatched
from ultrazoo.bench.crossover import crossings, panels
from ultrazoo.bench.machine import GEMM
from ultrazoo.bench.records import Task, append_rows, read_rows
from ultrazoo.bench.tables import tables_of
from ultrazoo.bench.timing import interleave, peak_memory
from ultrazoo.errors import DataError
from ultrazoo.spec import Cost


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> StillBench:
    """A run on a still clock."""
    still = StillBench()
    monkeypatch.setattr(session, "ceilings", lambda device, dtype: still.limits)
    return still


def test_medians_and_quartiles_are_of_single_calls_and_the_rounds_fill_the_time() -> None:
    clock = Clock()
    timings = interleave({"a": clock.case(0.1), "b": clock.case(1e-4)}, CPU, seconds=10.0, clock=clock)
    assert timings["a"].median == pytest.approx(0.1) and timings["b"].median == pytest.approx(1e-4)
    assert (
        timings["a"].rounds == timings["b"].rounds == math.ceil(10 / (0.1 + 100e-4))
    )  # b: 50 calls, and as many before
    spread = clock.case([9, 9, 9, 1, 2, 3, 4, 5])  # three calls before the rounds
    timing = interleave({"c": spread}, CPU, seconds=10.0, clock=clock)["c"]
    assert (timing.lower, timing.median, timing.upper, timing.rounds) == (2, 3, 4, 5)


def test_rounds_begin_with_another_case_each_and_long_ones_are_three() -> None:
    clock = Clock()
    cases = {name: clock.case(1.0, name) for name in "abc"}
    assert interleave(cases, CPU, seconds=0.5, clock=clock)["a"].rounds == 3
    assert "".join(clock.order[9:]) == "abcbcacab"


def test_peak_memory_counts_what_a_call_frees_again() -> None:
    if peak_memory(lambda: None, CPU) is None:
        pytest.skip("this system does not tell the peak of a process")
    used = peak_memory(lambda: torch.ones(4 * 2**20), CPU)
    assert used is not None and 0.9 * 2**24 < used < 2 * 2**24


def task(length: int = 16, **changes: object) -> Task:
    values = {"kind": "op", "name": "x::y", "direction": "forward", "tokens": 4 * length, "batch": 4, "length": length}
    return Task(**{**values, "sample": f"B4 L{length}", **changes})  # type: ignore[arg-type]


def test_rates_follow_from_cost_and_median(still: StillBench, monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = still.bench.measure(task(cost=Cost(flops=8e9, bytes=4e9)), "f", {"a": still.clock.case(2.0)})
    assert row.median_s == pytest.approx(2) and row.tokens_per_s == pytest.approx(32)
    assert row.gflops == pytest.approx(4) and row.gemm_percent == pytest.approx(40)
    assert row.gbytes == pytest.approx(2) and row.copy_percent == pytest.approx(10)
    assert row.spread == pytest.approx(0, abs=1e-6)


def test_what_would_take_too_long_or_too_much_memory_is_left_out_with_a_line(
    still: StillBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, quick = still.clock.case(1.0), still.clock.case(0.1)
    still.bench.measure(task(16), "f", {"slow": slow, "quick": quick})
    found = still.bench.measure(task(128), "f", {"slow": slow, "quick": quick})  # 64 times the pairs of tokens
    assert [row.backend for row in found] == ["quick"]
    assert "f: slow is left out from L = 128 on: it might take 64 s" in still.said[-1]
    monkeypatch.setattr(session, "free_memory", lambda device: 2**30)
    still.bench._known["f", "quick"] = [replace(found[0], peak_bytes=2**28)]
    assert still.bench.measure(task(256), "f", {"quick": quick}) == []
    assert "might take 1.0 GiB, of 1.0 free" in still.said[-1]
    assert still.bench.measure(task(32), "f", {"slow": slow})  # shorter than what is known: tried


def test_the_crossover_is_the_last_one_and_is_interpolated_on_log_axes() -> None:
    rows = rows_of({"ours": [4, 8, 16], "theirs": [1, 4, 64], "reference": [9, 9, 9], "slow": [5, 9, 17]})
    (panel,) = panels(rows)
    crossing, always = crossings(panel)
    assert (crossing.fast, crossing.slow) == ("ours", "theirs")
    assert crossing.length == pytest.approx(128 * 2 ** (1 / 3))  # the ratio falls from 2 to 1/4
    assert always.length is None and "at every length from 64 to 256" in str(always)
    assert panels(rows_of({"ours": [1.0]})) == []


def test_rows_survive_a_file_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    rows, path = rows_of({"a": [1, 2]}), tmp_path / "rows.jsonl"
    append_rows(path, rows[:1])
    append_rows(path, rows[1:])
    assert read_rows(path) == rows
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert read_rows(path) == rows
    path.write_text(path.read_text(encoding="utf-8-sig"))
    good = path.read_text().splitlines()[0]
    for bad in ("{", good.replace('"schema_version": 1', '"schema_version": 99'), '{"schema_version": 1}', "[]"):
        path.write_text(f"{good}\n{bad}\n")
        with pytest.raises(DataError, match=r"rows\.jsonl:2"):
            read_rows(path)


def test_a_verdict_needs_quartiles_that_do_not_overlap() -> None:
    old, new = rows_of({"a": [1, 1, 1], "gone": [1]}), rows_of({"a": [0.5, 1.1, 2]})
    new[2] = replace(new[2], gemm_gflops=50.0)
    changes = compare([replace(old[0], median_s=7.0), *old], new)  # of rows for the same thing the last one counts
    assert [change.verdict for change in changes] == ["faster", "within the spread", "slower"]
    assert [change.ratio for change in changes] == pytest.approx([0.5, 1.1, 2])
    assert unmatched(old, new) == (1, 0)
    (note,) = notes(changes, old, new)
    assert "2.00 times as long" in note
    other = [replace(row, machine=replace(row.machine, name="another")) for row in new]
    assert "name differs" in notes(changes[:1], old, other)[0]


def test_what_is_too_noisy_to_use_is_marked(tmp_path: Path) -> None:
    (steady,) = rows_of({"compiled": [1.0]})
    cost = {"flops": 5e11, "bytes": 1e9}
    noisy, beside_noise = replace(steady, q1_s=0.5, q3_s=4.36, **cost), replace(steady, gemm_spread=0.4, **cost)
    assert (noisy.is_noisy, noisy.has_noisy_ceiling) == (True, True)
    assert (beside_noise.is_noisy, beside_noise.has_noisy_ceiling) == (False, True)
    assert not steady.is_noisy and not replace(steady, gemm_spread=0.1, copy_spread=0.2).has_noisy_ceiling
    table = tables_of([noisy, replace(beside_noise, backend="reference"), replace(steady, backend="third", **cost)])[0]
    first, second, third = (dict(zip(table.headers, row, strict=True)) for row in table.rows)
    assert (first["±"], first["of GEMM"], first["of copy"]) == ("193%!", "500%!", "5%!")
    assert (second["±"], second["of GEMM"]) == ("10%", "500%!") and (third["±"], third["of GEMM"]) == ("10%", "500%")
    assert "!: too noisy to use" in table.legend
    longer = replace(steady, sample="B4 K8 L128", length=128)
    (swept,) = tables_of([replace(row, kind="block") for row in (noisy, longer)])
    assert "±193%!" in swept.rows[0][2] and "!" not in swept.rows[1][2]
    append_rows(tmp_path / "rows.jsonl", [noisy, beside_noise])
    assert read_rows(tmp_path / "rows.jsonl") == [noisy, beside_noise]
    old = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])
    (tmp_path / "old.jsonl").write_text(json.dumps({k: v for k, v in old.items() if not k.endswith("_spread")}))
    assert read_rows(tmp_path / "old.jsonl") == [noisy], "files of before the spread of the ceilings was kept"
    (change,) = compare([steady], [replace(noisy, q1_s=2.0, median_s=2.5)])
    assert change.verdict == "too noisy"


def test_the_spread_of_the_ceilings_is_kept(still: StillBench) -> None:
    still.limits[GEMM] = (still.clock.case([0.5] * 3 + [0.1, 0.9, 0.5, 0.1, 0.9]), 5e9)  # three before the rounds
    (row,) = still.bench.measure(task(), "family", {"compiled": still.clock.case(1.0)})
    assert row.gemm_spread is not None and row.gemm_spread > 0.25 and row.copy_spread == 0.0
    assert row.has_noisy_ceiling and not row.is_noisy
