"""``ultrazoo bench quality``: exact optima, tasks that tell mixers apart, rows that survive an interruption."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench_parts import CPU, MACHINE
from cli_parts import call
from pydantic import Field
from torch import Tensor, nn

from ultrazoo.bench.quality import encoder, run
from ultrazoo.bench.quality.markov import Hmm, markov_chain, mixture, stationary
from ultrazoo.bench.quality.rows import Settings, append, read
from ultrazoo.bench.quality.tasks import DEFAULT_TASKS, MASK, Copy, Examples, Floats, Markov, Recall, Task, find_task
from ultrazoo.errors import ConfigError, DataError
from ultrazoo.nn.block_config import BlockConfig
from ultrazoo.ops import loader
from ultrazoo.plugins import Plugin
from ultrazoo.registry import Registry, registry
from ultrazoo.spec import BlockSpec

TASKS = [find_task(name) for name in (*DEFAULT_TASKS, "markov:2", "recall:3")]


def enumerated(model: Hmm, symbols: Floats, masked: Floats) -> Floats:
    """p(x_t | what is shown) of one row, by summing the probability of every text and every path of states."""
    length, states, vocabulary = len(symbols), *model.emission.shape
    totals = np.zeros((length, vocabulary))
    for text in itertools.product(range(vocabulary), repeat=length):
        for path in itertools.product(range(states), repeat=length):
            chance = model.initial[path[0]] * np.prod([model.emission[z, x] for z, x in zip(path, text, strict=True)])
            chance *= np.prod([model.transition[a, b] for a, b in itertools.pairwise(path)])
            for t in range(length):  # what the others say of t: its own token counts as masked
                if all(m or i == t or x == s for i, (m, x, s) in enumerate(zip(masked, text, symbols, strict=True))):
                    totals[t, text[t]] += chance
    return totals / totals.sum(1, keepdims=True)


def test_forward_backward_equals_the_sum_over_all_texts_and_paths() -> None:
    random = np.random.default_rng(0)
    noisy = Hmm(random.dirichlet([1] * 3), random.dirichlet([1] * 3, 3), random.dirichlet([1] * 2, 3))
    mixed = mixture([markov_chain(1, 2, 1.5, i) for i in range(2)])
    for model in (noisy, mixed, markov_chain(2, 2, 1.5, 7)):
        for mask in ([1, 0, 1, 1], [0, 1, 0, 0], [1, 1, 1, 1]):
            symbols, masked = model.sample(random.random((1, 4)), random.random((1, 4))), np.array([mask], dtype=bool)
            found = model.posterior(symbols, masked)
            np.testing.assert_allclose(found[0], enumerated(model, symbols[0], masked[0]), rtol=1e-10, atol=1e-14)


def test_a_chain_keeps_its_stationary_distribution_and_its_order() -> None:
    chain = markov_chain(2, 3, 2.0, 1)
    np.testing.assert_allclose(chain.initial @ chain.transition, chain.initial, atol=1e-12)
    np.testing.assert_allclose(stationary(np.array([[0.5, 0.5], [0.25, 0.75]])), [1 / 3, 2 / 3])
    random = np.random.default_rng(0)
    text = chain.sample(random.random((2000, 30)), random.random((2000, 30)))
    after = text[:, 2:][(text[:, :-2] == 1) & (text[:, 1:-1] == 2)]  # what follows 1 2
    expected = [chain.transition[1 * 3 + 2, 2 * 3 + symbol] for symbol in range(3)]
    np.testing.assert_allclose(np.bincount(after, minlength=3) / len(after), expected, atol=4 / len(after) ** 0.5)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_oracle_is_at_the_optimum_and_nothing_is_below_it(task: Task) -> None:
    examples = task.draw(400, run.EVALUATE)
    posterior = task.posterior(examples)
    with np.errstate(divide="ignore"):
        oracle = run.score(np.log(posterior), posterior, examples)
    assert abs(oracle.excess) < 1e-12 and oracle.accuracy == oracle.best_accuracy
    entropy = -np.sum(posterior * np.log(posterior, out=np.zeros_like(posterior), where=posterior > 0), axis=1)
    noise = 4 * 1.5 / len(posterior) ** 0.5  # no surprise here has a standard deviation above 1.5 nats
    assert abs(oracle.loss - entropy.mean()) <= (noise if isinstance(task, Markov) else 0)
    blurred = run.score(np.log(0.9 * posterior + 0.1 / task.vocab_size), posterior, examples)
    assert blurred.excess > 0.02 and blurred.floor == oracle.floor
    if not isinstance(task, Markov):
        assert (oracle.accuracy, oracle.loss, oracle.floor) == (1, 0, 0)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_rows_are_named_by_numbers_and_never_show_the_answer(task: Task) -> None:
    examples, again, other = task.draw(64, 1, 2), task.draw(64, 1, 2), task.draw(64, 1, 3)
    np.testing.assert_array_equal(examples.tokens, again.tokens)
    np.testing.assert_array_equal(examples.labels, again.labels)
    assert (examples.tokens != other.tokens).any(1).all()
    targets = examples.labels >= 0
    assert (examples.tokens[targets] == MASK).all() and not (examples.tokens[~targets] == MASK).any()
    assert targets.any(1).all() and examples.tokens.min() > 0 and examples.labels.max() < task.vocab_size
    shuffled = Examples(examples.tokens, np.where(targets, 5, examples.labels))
    np.testing.assert_array_equal(task.posterior(shuffled), task.posterior(examples))  # labels are not read


def test_what_the_rows_look_like() -> None:
    row = Recall(4).draw(1, 5)
    pairs = {int(key): int(value) for key, value in row.tokens[0, :8].reshape(4, 2)}
    assert len(pairs) == 4 and row.tokens.shape == (1, 16)
    assert [pairs[key] for key in row.tokens[0, 8::2]] == list(row.labels[0, 9::2])
    copy = Copy(3).draw(1, 5)
    content = [token for token in copy.tokens[0, :9] if token != 5]
    assert content == list(copy.labels[0, 10:]) and list(copy.tokens[0, 9:]) == [3, 4, 4, 4]


class BlindConfig(BlockConfig):
    """Options of ``blind``."""

    hidden_size: int = Field(gt=0)


class Blind(nn.Module):
    """y = W x: sees no other token."""

    def __init__(self, config: BlindConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        return self.dense(x) if segments is None else self.dense(x) * (segments > 0).unsqueeze(-1)


class Heavy(Blind):
    """With more parameters than there are."""

    def __init__(self, config: BlindConfig) -> None:
        super().__init__(config)
        self.more = nn.Parameter(torch.zeros(100_000))


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> BlockSpec:
    """A plugin's mixer beside everything that is installed; no kernels are built."""
    facts: dict[str, Any] = {"paper": "none", "equation": "y = W x", "state_size": lambda config: 0}
    spec = BlockSpec(name="blind", kind="mixer", module=Blind, config=BlindConfig, **facts)
    blocks = (spec, replace(spec, name="heavy", module=Heavy))
    zoo = Registry([*registry().plugins, Plugin(name="b", distribution="b", version="1", module="b", blocks=blocks)])
    for module in ("ultrazoo.model", "ultrazoo.config.model", "ultrazoo.bench.quality.run"):
        monkeypatch.setattr(f"{module}.registry", lambda: zoo)
    monkeypatch.setattr(loader, "load", lambda *names: loader.Loaded(reason="not needed here", fix="none"))
    monkeypatch.setattr(run, "require_parity", lambda *given: [])
    return spec


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def bench_of(settings: Settings) -> run.QualityBench:
    return run.QualityBench(settings=settings, device=CPU, machine=MACHINE, say=lambda text: None)


def test_a_mixer_without_memory_fails_recall_and_attention_learns_it(blind: BlockSpec, one_thread: None) -> None:
    bench = bench_of(Settings(steps=120, rates=(4e-3,)))
    bench.run([registry().block("mixer", "standard_attn"), blind], [Recall(4)], [0])
    attention, nothing = bench.rows
    assert attention.accuracy > 0.9
    assert nothing.accuracy < 0.12 and nothing.excess is not None and nothing.excess > np.log(16) - 0.3
    assert abs(attention.parameters / nothing.parameters - 1) < 0.01 and nothing.kept == 0
    assert attention.kept == 2 * 64 * 16 and attention.state_size is None


def test_two_runs_are_equal_and_the_best_rate_counts(blind: BlockSpec, one_thread: None) -> None:
    torch.manual_seed(9)
    before = torch.get_rng_state()
    settings = Settings(size=16, layers=1, steps=4, batch=4, rates=(1e-3, 1e-2))
    first, again = bench_of(settings), bench_of(settings)
    for bench in (first, again):
        bench.run([blind], [Markov(1)], [0, 1])
    assert torch.equal(torch.get_rng_state(), before)
    assert [(row.excess, row.tried) for row in first.rows] == [(row.excess, row.tried) for row in again.rows]
    zero, one = first.rows
    assert zero.excess != one.excess and zero.floor == one.floor  # seeds differ, the evaluation set does not
    assert zero.excess is not None and 0 < zero.excess < 4 and len(zero.tried) == 2
    assert zero.learning_rate == min(settings.rates, key=lambda rate: zero.tried[f"{rate:g}"] or 0)


def test_a_run_that_diverges_has_no_excess(blind: BlockSpec, one_thread: None, tmp_path: Path) -> None:
    bench = bench_of(Settings(size=16, layers=1, steps=30, batch=4, rates=(1e30,)))
    bench.run([blind], [Recall(2)], [0])
    (row,) = bench.rows
    assert row.excess is None and row.learning_rate is None and row.tried == {"1e+30": None} and row.accuracy == 0
    append(tmp_path / "rows.jsonl", row)
    assert read(tmp_path / "rows.jsonl") == [row] and "not finite" in str(row)


def test_parameters_agree_whatever_the_mixer_needs() -> None:
    attention = registry().block("mixer", "standard_attn")
    for name, spec in registry().mixers().items():
        counts = {n: encoder.fit(spec, 40, n, 2) for n in (32, 64)}
        for size, (config, count) in counts.items():
            budget = encoder.count_parameters(encoder.encoder_config(attention, 40, size, 4 * size, 2))
            assert abs(count / budget - 1) < encoder.TOLERANCE, name
            assert count == encoder.count_parameters(config) and config.ffn_hidden_size >= config.hidden_size


def test_a_mixer_that_does_not_fit_is_left_out_only_where_nobody_named_it(blind: BlockSpec, one_thread: None) -> None:
    said: list[str] = []
    bench = bench_of(Settings(size=16, layers=1, steps=1, batch=1, rates=(1e-3,)))
    bench.say = said.append
    heavy = run.registry().block("mixer", "heavy")
    with pytest.raises(ConfigError, match=r"heavy: got .* parameters at 8 channels"):
        bench.run([heavy, blind], [Copy(2)], [0])
    bench.run([heavy, blind], [Copy(2)], [0], strict=False)
    assert [row.name for row in bench.rows] == ["blind"] and "heavy is left out" in said[0]
    with pytest.raises(ConfigError):
        bench.run([heavy], [Copy(2)], [0], strict=False)


TINY = ("--size", "16", "--layers", "1", "--steps", "2", "--batch", "2", "--rate", "1e-3", "--threads", "1")


def test_the_command_prints_writes_draws_and_takes_up_where_it_stopped(
    blind: BlockSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, drawing = tmp_path / "rows.jsonl", tmp_path / "quality.png"
    options = (*TINY, "--output", rows, "--task", "copy:2", "--task", "markov")
    assert call("bench", "quality", "blind", *options) == 0
    assert "optimum" in capsys.readouterr().out
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text(lines[0] + lines[1][:40])  # cut off while it was written
    assert call("bench", "quality", "blind", "standard_attn", *options, "--resume", "--plot", drawing, "--json") == 0
    printed = capsys.readouterr()
    assert "blind, copy:2" not in printed.err and "blind, markov:1" in printed.err
    found = json.loads(printed.out)["rows"]
    names = [(row["name"], row["task"]) for row in found]
    assert names == list(itertools.product(["blind", "standard_attn"], ["copy:2", "markov:1"]))
    assert [(row.name, row.task) for row in read(rows)] == names
    rows.write_text(rows.read_text(), encoding="utf-8-sig")
    assert [(row.name, row.task) for row in read(rows)] == names
    assert found[0]["kind"] == "quality" and found[0]["machine"]["threads"] == 1
    assert drawing.read_bytes().startswith(b"\x89PNG") and drawing.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("retnt",), "did you mean 'retnet'"),
        (("--task", "recal"), "did you mean 'recall'"),
        (("--task", "recall:0"), "the pairs, from 1"),
        (("--task", "markov:x"), "the order, from 1 to 3"),
        (("--steps", "3", "--minutes", "1"), "expected one of them"),
        (("--resume",), "without --output"),
        (("--rate", "0"), "a rate above 0"),
        (("--output", "absent/rows.jsonl"), "make it first"),
    ],
)
def test_a_wrong_call_ends_with_2(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert call("bench", "quality", *arguments) == 2
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("arguments", [("retnet", "--length", "8"), ("quality", "retnet", *TINY)])
def test_the_cores_time_is_refused_where_they_do_not_do_the_work(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ultrazoo.train.runtime.pick_device", lambda name, where: torch.device(name))
    assert call("bench", *arguments, "--cpu-time", "--device", "cuda") == 2
    assert "--cpu-time: got it with device 'cuda', expected cpu" in " ".join(capsys.readouterr().err.split())


def test_a_file_of_other_rows_is_refused(tmp_path: Path) -> None:
    for line in ('{"kind": "op", "schema_version": 1}', '{"schema_version": 1}', "text"):
        (tmp_path / "rows.jsonl").write_text(line + "\n")
        with pytest.raises(DataError, match=r"rows.jsonl:1: got"):
            read(tmp_path / "rows.jsonl")
