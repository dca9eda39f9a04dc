"""What the benchmark times, and what it refuses to time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from bench_parts import CPU, StillBench, spec_of
from torch import Tensor

from ultrazoo.bench import inductor, session
from ultrazoo.bench.blocks import block_ways
from ultrazoo.bench.calls import as_sample, calls_of
from ultrazoo.bench.gate import ParityError, require_parity
from ultrazoo.bench.ops import _torch_compile, at_length, bench_op, family_of, length_of, samples_of
from ultrazoo.config import block_config, model_around
from ultrazoo.errors import ConfigError, UnknownNameError
from ultrazoo.ops import kernel_policy, library, loader
from ultrazoo.registry import registry
from ultrazoo.spec import Sample


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> StillBench:
    """A run on a still clock."""
    still = StillBench()
    monkeypatch.setattr(session, "ceilings", lambda device, dtype: still.limits)
    return still


def test_samples_are_resized_along_their_length() -> None:
    segments = torch.arange(24).view(2, 12)
    sample = Sample(name="B2 L12 D3", args=(torch.arange(72.0).view(2, 12, 3), torch.ones(3)), kwargs={"s": segments})
    assert (length_of(sample), family_of(sample)) == (12, "B2 D3")
    long, short = at_length(sample, 30), at_length(sample, 5)
    assert long.name == "B2 L30 D3" and long.args[0].shape == (2, 30, 3) and long.kwargs["s"].shape == (2, 30)
    assert torch.equal(long.args[0][:, 12:24], sample.args[0]) and torch.equal(short.args[0], sample.args[0][:, :5])
    assert short.args[1] is sample.args[1]


@pytest.mark.parametrize("name", ["retnet", "mamba", "ode"])
def test_an_ops_call_in_a_block_becomes_a_sample_of_its_public_function(name: str) -> None:
    spec = registry().block("mixer", name)
    config = model_around(spec, 32)
    block = spec.module(block_config(spec, config))
    with torch.no_grad(), kernel_policy("reference"):
        calls = calls_of(lambda: block(torch.randn(2, 9, 32)), "ultrazoo")
        for op in map(registry().op, spec.ops):
            call = next(call for call in calls if call.name == op.name)
            got = op.op(*(sample := as_sample(op, call, "in a block")).args, **sample.kwargs)
            result = call.result[0] if isinstance(call.result, tuple) else call.result
            assert torch.equal(got, result)
            assert op.cost(sample).flops > 0


class Rounded(torch.autograd.Function):
    """2 x, with a gradient that is off in the fourth digit."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return 2.001 * grad


@pytest.mark.parametrize(
    ("op", "said"), [(lambda x: 2.001 * x, "forward"), (Rounded.apply, "gradient of x"), (lambda y: y / None, "raised")]
)
def test_a_plugins_op_that_differs_from_its_reference_is_not_timed(still: StillBench, op: Callable, said: str) -> None:
    def public(x: Tensor) -> Tensor:
        return op(x)

    with pytest.raises(ParityError, match=said) as caught:
        bench_op(still.bench, spec_of(public))
    assert caught.value.exit_code == 3 and not still.bench.rows
    bench_op(still.bench, spec_of(lambda x: x + x))
    assert [row.backend for row in still.bench.rows] == ["op", "reference", "add"] * 2
    assert all(check.ok for check in still.bench.parity)


def test_a_wrong_compiled_kernel_is_not_timed(still: StillBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "load", lambda *_: loader.Loaded(reason="not needed here"))
    op = library.define("test_bench_double(Tensor x) -> Tensor", lambda x: 2 * x, fake=torch.empty_like)
    spec = replace(spec_of(lambda x: op(x), "ultrazoo::test_bench_double"), reference=op.reference)
    bench_op(still.bench, replace(spec, baselines={}))
    assert {row.backend for row in still.bench.rows} == {"reference"}, "nothing is compiled yet"
    assert "timed without it" in still.said[-1]
    torch.library.impl("ultrazoo::test_bench_double", "CPU")(lambda x: torch.where(x == x.max(), 2 * x + 1e-3, 2 * x))
    with pytest.raises(ParityError, match=r"compiled.*\n.*forward: error 0\.000") as caught:
        require_parity([spec], CPU, torch.float32, still.bench.say)
    assert "not timed" in str(caught.value)


def test_what_cannot_be_asked_for_is_refused(still: StillBench) -> None:
    good = spec_of(lambda x: x + x)
    still.bench.backends = ("op", "refrence")
    with pytest.raises(UnknownNameError, match="did you mean 'reference'"):
        bench_op(still.bench, good)
    still.bench.backends, still.bench.backward = None, True
    with pytest.raises(ConfigError, match="no gradient"):
        bench_op(still.bench, replace(good, differentiable=False))
    flat = replace(good, bench_samples=lambda device, dtype: [Sample(name="8x3", args=(torch.ones(8, 3),))])
    with pytest.raises(ConfigError, match="no length"):
        list(samples_of(flat, CPU, torch.float32, [32]))
    assert [sample.name for sample in samples_of(good, CPU, torch.float32, [32, 64])] == ["B2 D3 L32", "B2 D3 L64"]


def test_torch_compile_is_of_the_mathematics_behind_every_op_and_must_agree(
    still: StillBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(inductor, "require_compiler", lambda device: None)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: seen.append(function.__name__) or function)
    for name, spec in registry().ops().items():
        sample = next(iter(spec.samples(CPU, torch.float32)))
        case = _torch_compile(still.bench, spec, sample)[inductor.TORCH_COMPILE]
        case()
        assert seen[-1] == f"{name.partition('::')[2]}_reference"
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: lambda *given: function(*given) * 1.01)
    retention = registry().op("ultrazoo::retention")
    assert _torch_compile(still.bench, retention, next(iter(retention.samples(CPU, torch.float32)))) == {}
    assert "left out, it is off by 0.01" in still.said[-1]


def test_a_block_has_a_way_for_each_kernel_policy_that_makes_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = [registry().op(name) for name in ("ultrazoo::rk4_combine", "ultrazoo::rk4_stage")]
    monkeypatch.setattr(loader, "load", lambda *_: loader.Loaded(reason="none"))
    has = {"rk4_combine": False, "rk4_stage": False}
    monkeypatch.setattr(library.Op, "has_kernel", lambda op, device: has[op.name])
    assert list(block_ways(ops, CPU)) == ["reference"]
    has["rk4_stage"] = True
    assert list(block_ways(ops, CPU)) == ["auto", "reference"]
    has["rk4_combine"] = True
    assert list(block_ways(ops, CPU)) == ["compiled", "reference"]
    assert list(block_ways([], CPU)) == ["torch"]
