"""The parity harness is itself tested: a true kernel passes, each planted fault is caught by the check meant for it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cli_parts import call
from torch import Tensor

from ultrazoo.ops.library import _ops, define
from ultrazoo.registry import registry
from ultrazoo.spec import Cost, OpSpec, Sample
from ultrazoo.testing import measure, parity
from ultrazoo.testing.parity import check_op, relative_error

CPU = torch.device("cpu")
LENGTH = 21
NUMBERS = itertools.count()


def running_sum(x: Tensor, decay: float) -> Tensor:
    """y_t = decay y_{t-1} + x_t over the last dimension: an op with a chunk edge and a tail to get wrong."""
    y, state = torch.empty_like(x), torch.zeros_like(x[..., 0])
    for t in range(x.shape[-1]):
        state = decay * state + x[..., t]
        y[..., t] = state
    return y


def running_sum_backward(grad: Tensor, decay: float) -> Tensor:
    return running_sum(grad.flip(-1), decay).flip(-1)


def off_by_one_at_a_chunk_edge(x: Tensor, decay: float) -> Tensor:
    y = running_sum(x, decay)
    y[..., 8:9] = y[..., 7:8]
    return y


def wrong_tail(x: Tensor, decay: float) -> Tensor:
    y = running_sum(x, decay)
    y[..., 16:] = running_sum(x, decay * 1.001)[..., 16:]
    return y


def unwritten_output(x: Tensor, decay: float) -> Tensor:
    y = torch.empty_like(x)
    y[..., :-1] = running_sum(x, decay)[..., :-1]
    return y


def writes_its_input(x: Tensor, decay: float) -> Tensor:
    y = running_sum(x, decay)
    x.mul_(1)
    return y


def reads_by_wrong_strides(x: Tensor, decay: float) -> Tensor:
    flat = x.as_strided(x.shape, torch.empty(x.shape, device="meta").stride())
    return running_sum(flat, decay)


class Noisy:
    """A sum whose last bit depends on how often it was called."""

    calls = 0

    def __call__(self, x: Tensor, decay: float) -> Tensor:
        Noisy.calls += 1
        return running_sum(x, decay) * (1 + Noisy.calls % 2 * torch.finfo(x.dtype).eps)


def wrong_sign(grad: Tensor, decay: float) -> Tensor:
    return -running_sum_backward(grad, decay)


def forgets_the_state(grad: Tensor, decay: float) -> Tensor:
    return torch.cat([running_sum_backward(part, decay) for part in grad.split(8, dim=-1)], dim=-1)


@pytest.fixture
def op() -> Iterator[Callable[..., OpSpec]]:
    """A throwaway op whose kernel, and backward kernel, are the given Python functions."""
    kernels = torch.library.Library("ultrazoo", "IMPL", "CPU")
    number = next(NUMBERS)
    names = [f"running_sum{number}_backward", f"running_sum{number}"]
    backward = define(
        f"{names[0]}(Tensor grad, float decay) -> Tensor", running_sum_backward, fake=lambda g, d: g.new_empty(g.shape)
    )
    forward = define(
        f"{names[1]}(Tensor x, float decay) -> Tensor",
        running_sum,
        fake=lambda x, d: x.new_empty(x.shape),
        setup_context=lambda ctx, inputs, output: setattr(ctx, "decay", inputs[1]),
        backward=lambda ctx, grad: (ctx.backward_op(grad, ctx.decay), None),
    )

    def make(kernel: Callable[..., Tensor], backward_kernel: Callable[..., Tensor] = running_sum_backward) -> OpSpec:
        kernels.impl(names[1], kernel)
        kernels.impl(names[0], backward_kernel)

        def samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
            draw = torch.Generator().manual_seed(0)
            for name, shape in (("row", (LENGTH,)), ("one", (3, 1)), ("rows", (2, 3, LENGTH)), ("none", (0, 4))):
                yield Sample(name=name, args=(torch.randn(shape, generator=draw).to(device, dtype), 0.9))

        def public(x: Tensor, decay: float) -> Tensor:
            result: Tensor = forward(x, decay)
            return result

        return OpSpec(
            name=forward.qualname,
            op=public,
            reference=running_sum,
            samples=samples,
            bench_samples=samples,
            cost=lambda sample: Cost(flops=2.0 * sample.args[0].numel(), bytes=8.0 * sample.args[0].numel()),
        )

    yield make
    kernels._destroy()
    for name in names:
        del _ops[f"ultrazoo::{name}"]
    assert backward.qualname


def failed(spec: OpSpec) -> set[str]:
    return {check.check for check in check_op(spec, CPU, torch.float32, "compiled") if not check.ok}


def test_a_true_kernel_passes(op: Callable[..., OpSpec]) -> None:
    found = list(check_op(op(running_sum), CPU, torch.float32, "compiled"))
    assert [check.check for check in found if not check.ok] == []
    assert {"kernel exists", "opcheck", "forward", "gradient of x", "reruns bit-equal"} <= {
        check.check for check in found
    }


@pytest.mark.parametrize(
    ("kernel", "caught_by"),
    [
        (off_by_one_at_a_chunk_edge, "forward"),
        (wrong_tail, "forward"),
        (unwritten_output, "strides and poisoned memory"),
        (writes_its_input, "inputs unmodified"),
        (reads_by_wrong_strides, "strides and poisoned memory"),
        (Noisy(), "reruns bit-equal"),
    ],
)
def test_a_wrong_kernel_is_caught(op: Callable[..., OpSpec], kernel: Callable[..., Tensor], caught_by: str) -> None:
    assert caught_by in failed(op(kernel))


@pytest.mark.parametrize("backward", [wrong_sign, forgets_the_state])
def test_a_wrong_gradient_is_caught(op: Callable[..., OpSpec], backward: Callable[..., Tensor]) -> None:
    assert failed(op(running_sum, backward)) >= {"gradient of x"}


def test_a_wrong_formula_of_the_reference_is_caught_by_finite_differences(op: Callable[..., OpSpec]) -> None:
    spec = registry().op("ultrazoo::rk4_combine")
    assert all(check.ok for check in check_op(spec, CPU, torch.float32, "reference") if "gradcheck" in check.check)

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 3

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            return 2 * grad

    wrong = OpSpec(**{**vars(spec), "op": lambda h, k1, k2, k3, k4, dt: Twice.apply(spec.op(h, k1, k2, k3, k4, dt))})
    bad = [check for check in check_op(wrong, CPU, torch.float32, "reference") if not check.ok]
    assert any("gradcheck" in check.check for check in bad)


def test_an_op_without_its_kernel_is_not_compared_with_itself(
    op: Callable[..., OpSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = op(running_sum)
    status = parity.kernel_status(spec.name, "cpu")
    monkeypatch.setattr(
        parity, "kernel_status", lambda name, device: type(status)(**{**vars(status), "compiled": False})
    )
    found = list(check_op(spec, CPU, torch.float32, "compiled"))
    assert [(check.check, check.ok) for check in found] == [("kernel exists", False)]


def test_errors_are_relative_to_the_largest_truth_and_nan_is_infinite() -> None:
    truth = torch.tensor([0.0, 4.0])
    assert relative_error(torch.tensor([0.0, 5.0]), truth) == 0.25
    assert relative_error(torch.tensor([float("nan"), 4.0]), truth) == float("inf")
    assert relative_error(torch.tensor([]), torch.tensor([])) == 0.0


def test_the_command_reports_every_check_and_exits_3_on_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("parity", "rk4_stage", "--dtype", "float32", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["failed"] == 0 and report["passed"] == len(report["checks"]) > 8
    assert {check["backend"] for check in report["checks"]} >= {"reference"}
    monkeypatch.setattr(measure, "FLOOR_ROUNDINGS", -1e3)
    assert call("parity", "rk4_stage", "--dtype", "float32") == 3
    assert "FAIL" in capsys.readouterr().out
    assert call("parity", "rk4stage") == 2
    assert "did you mean" in capsys.readouterr().err
    assert call("parity", "rk4_stage", "--dtype", "int8") == 2


def test_doctor_names_the_kernel_of_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("doctor", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert {entry["op"] for entry in facts["ops"]} == set(registry().ops())
    assert facts["torch"] == torch.__version__
    for entry in facts["ops"]:
        assert entry["detail"] and (entry["compiled"] or entry["fix"])
    (ours,) = [entry for entry in facts["libraries"] if entry["namespace"] == "ultrazoo"]
    assert ours["of"].startswith("ultrazoo ") and ours["ops"] >= len(registry().ops()) and ours["detail"]
