"""``ultrazoo train`` and what is done with a run: output, where it goes, and exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from cli_parts import call, train_tiny, write_config

import ultrazoo
from ultrazoo.bench import footprint
from ultrazoo.cli.use import _shown
from ultrazoo.config import load_config
from ultrazoo.ops.policy import get_kernel_policy

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tiny(tmp_path_factory.mktemp("trained"))


def test_version_and_help(capsys: Capture) -> None:
    assert call("--version") == 0
    assert capsys.readouterr().out == f"ultrazoo {ultrazoo.__version__}\n"
    assert call("--help") == 0
    commands = capsys.readouterr().out
    for name in ("train", "list", "show", "schema", "plugins", "fill-mask", "encode", "plot", "data"):
        assert f" {name} " in commands


def test_a_wrong_call_exits_2(capsys: Capture) -> None:
    assert call("train", "embbert", "--frobnicate") == 2
    assert call("show") == 2
    assert call("train", "embbert", "--output-dir", "") == 2
    assert capsys.readouterr().out == ""


def test_printed_config_has_origins_and_loads_to_the_same_config(capsys: Capture, tmp_path: Path) -> None:
    overrides = ["training.learning_rate=3e-4", "model.layer_pattern=[retnet, ode]", "model.retention_heads=2"]
    flags = [argument for item in overrides for argument in ("--set", item)]
    assert call("train", "embbert", *flags, "--device", "cpu", "--print-config") == 0
    text = capsys.readouterr().out
    (tmp_path / "whole.yaml").write_text(text)
    expected = load_config("embbert", [*overrides, "training.device=cpu"])
    assert load_config(tmp_path / "whole.yaml").config.to_dict() == expected.config.to_dict()
    origins = {line.split(":")[0].strip(): line.rpartition("# ")[2] for line in text.splitlines() if "# " in line}
    assert [origins[name] for name in ("layer_pattern", "device", "hidden_size", "seed")] == [
        "command line",
        "command line",
        "file",
        "default",
    ]


def test_every_problem_of_a_config_is_shown_at_once(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("model:\n  hiden_size: 8\ntraining:\n  batch_size: 0\n")
    assert call("train", path) == 2
    err = capsys.readouterr().err
    assert "model.hiden_size: unknown field; did you mean 'hidden_size'?" in err and "training.batch_size: got 0" in err


def test_dry_run_builds_the_model_and_writes_nothing(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert call("train", config, "--dry-run") == 0
    table = capsys.readouterr().out
    assert "mixer standard_attn (x 2)" in table and "4 rows x 32 = 128" in table and "runs/tiny" in table
    assert f"1 file(s): {tmp_path / 'texts.parquet'}" in table and "adamw:" in table
    assert "GFLOP, forward and backward" in table and "measured with 4 rows per micro-batch" in table
    assert call("train", config, "--dry-run", "--set", "training.local_parquet_dir=/no/such") == 1
    assert "training.local_parquet_dir: /no/such: no such file" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_dry_run_follows_the_kernel_policy_of_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policies = []

    def measured(*_: object) -> None:
        policies.append(get_kernel_policy())

    monkeypatch.setattr(footprint, "measure_memory", measured)
    before = get_kernel_policy()
    for policy in ("reference", "auto"):
        assert call("train", write_config(tmp_path), "--dry-run", "--set", f"training.kernels={policy}") == 0
    assert policies == ["reference", before]
    assert get_kernel_policy() == before


def test_profile_steps_without_profile_are_no_call(capsys: Capture, tmp_path: Path) -> None:
    assert call("train", write_config(tmp_path), "--profile-steps", "5..2") == 2
    assert "--profile-steps acts with --profile only" in capsys.readouterr().err


def test_train_leaves_a_run_and_says_it_on_stderr_alone(run: Path, capsys: Capture, tmp_path: Path) -> None:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4, 5, 6]
    assert yaml.safe_load((run / "config.yaml").read_text())["training"]["output_dir"] == str(run)
    assert (run / "checkpoints" / "latest").read_text().strip() == "step-000006"
    assert call("train", write_config(tmp_path), "--output-dir", tmp_path / "run", "--set", "training.max_steps=1") == 0
    out, err = capsys.readouterr()
    assert out == "" and "validation loss" in err


def test_a_finished_run_is_not_trained_over_and_resumes_at_once(run: Path, capsys: Capture) -> None:
    config = run / "config.yaml"
    assert call("train", config) == 2
    assert "--resume auto" in capsys.readouterr().err
    before = (run / "checkpoints" / "step-000006" / "model.safetensors").stat().st_mtime_ns
    assert call("train", config, "--resume", "auto") == 0
    assert (run / "checkpoints" / "step-000006" / "model.safetensors").stat().st_mtime_ns == before


def test_fill_mask_prints_candidates(run: Path, capsys: Capture) -> None:
    assert call("fill-mask", run, "the [MASK] of the [MASK]", "--top-k", "3", "--json") == 0
    filled = json.loads(capsys.readouterr().out)
    assert [len(candidates) for candidates in filled] == [3, 3]
    assert call("fill-mask", run, "the [MASK] of the [MASK]", "--top-k", "3") == 0
    table = capsys.readouterr().out
    assert "the [MASK] of the [MASK]  (mask 2 of 2)" in table
    assert all(f"{candidate['probability']:.2%}" in table for candidates in filled for candidate in candidates)


def test_fill_mask_needs_a_mask(run: Path, capsys: Capture) -> None:
    assert call("fill-mask", run, "the king") == 2
    assert "got 'the king' without [MASK]" in capsys.readouterr().err


def test_encode_takes_texts_a_file_or_a_pipe(run: Path, capsys: Capture, tmp_path: Path) -> None:
    assert call("encode", run, "the king", "la reina") == 0
    expected = capsys.readouterr().out
    assert [len(line.split()) for line in expected.splitlines()] == [32, 32]
    (tmp_path / "lines.txt").write_text("the king\nla reina\n")
    assert call("encode", run, "--file", tmp_path / "lines.txt") == 0
    assert capsys.readouterr().out == expected
    with (tmp_path / "lines.txt").open() as piped, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", piped)
        assert call("encode", run, "--json") == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["text"] for record in records] == ["the king", "la reina"]
    assert [f"{value:.6g}" for value in records[0]["vector"]] == expected.splitlines()[0].split()
    assert call("encode", run, "the king", "--file", tmp_path / "lines.txt") == 2


def test_a_bad_line_of_a_file_is_reported_and_the_others_are_encoded(
    run: Path, capsys: Capture, tmp_path: Path
) -> None:
    assert call("encode", run, "the king", "la reina", "") == 0
    expected = capsys.readouterr().out
    (tmp_path / "lines.txt").write_bytes(b"\xef\xbb\xbfthe king\r\nni\xf1o\nla reina\n\n\xff")
    assert call("encode", run, "--file", tmp_path / "lines.txt") == 1
    out, err = capsys.readouterr()
    assert out == expected
    assert "lines.txt: line 2: got byte 0xF1, which is not UTF-8, at character 2" in err
    assert "line 5: got byte 0xFF" in err and "error: " in err and "2 text(s) skipped" in err
    assert "Traceback" not in err and "line 1:" not in err
    command = [sys.executable, "-m", "ultrazoo", "encode", str(run), "--json"]
    piped = (tmp_path / "lines.txt").read_bytes()
    done = subprocess.run(command, input=piped, capture_output=True, check=False)
    assert done.returncode == 1 and b"standard input: line 2: got byte 0xF1" in done.stderr
    assert [json.loads(line)["text"] for line in done.stdout.splitlines()] == ["the king", "la reina", ""]
    assert call("encode", run, "the king", "\udcff", "la reina", "") == 1
    out, err = capsys.readouterr()
    assert out == expected and "text 2: got byte 0xFF" in err


def test_words_are_shown_bare_and_what_continues_one_after_signs() -> None:
    shown = [_shown(token) for token in (" king", "ing", " ", "\n", ",", "天", "ก", "<0xE2>", "[PAD]", "5")]
    assert shown == ["king", "##ing", "' '", "'\\n'", ",", "天", "ก", "<0xE2>", "[PAD]", "##5"]


@pytest.mark.parametrize("command", ["fill-mask", "encode", "train", "bench", "parity", "bench quality"])
def test_an_unknown_device_is_a_wrong_call(command: str, run: Path, tmp_path: Path, capsys: Capture) -> None:
    subject = {"train": write_config(tmp_path), "bench": "retention", "parity": "retention", "bench quality": "mamba"}
    text = ["the [MASK]"] if command in ("fill-mask", "encode") else []
    assert call(*command.split(), subject.get(command, run), *text, "--device", "gpu") == 2
    err = capsys.readouterr().err
    assert "got 'gpu', expected one of auto, cpu, cuda, cuda:N, mps" in err and "Traceback" not in err


def test_plot_writes_a_picture(run: Path, capsys: Capture, tmp_path: Path) -> None:
    assert call("plot", run) == 0 and call("plot", run, "--output", tmp_path / "curves.png") == 0
    assert (run / "training.png").read_bytes()[:4] == (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert "unigram_entropy" in (run / "metrics.jsonl").read_text()


def test_data_convert(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one document\nof two lines\n\nanother\n")
    (tmp_path / "b.jsonl").write_text('{"body": "third"}\n{"body": 3}\n')
    output = tmp_path / "out.parquet"
    assert call("data", "convert", tmp_path / "a.txt", tmp_path / "b.jsonl", "-o", output, "--text-key", "body") == 0
    assert len(pq.read_table(output)) == 3
    err = capsys.readouterr().err
    assert "wrote 3 documents" in err and "skipped: 1 not text" in err
    assert call("data", "convert", tmp_path / "a.txt", "-o", output) == 1
    assert call("data", "convert", tmp_path / "a.txt", "-o", output, "--overwrite") == 0


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_writes_a_checkpoint_and_exits_130(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "ultrazoo", "train", str(write_config(tmp_path)), "--output-dir", str(run)]
    process = subprocess.Popen([*command, "--set", "training.max_steps=100000"], stderr=subprocess.PIPE, text=True)
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err and "error:" not in err
    assert (run / "checkpoints" / "latest").is_file()
