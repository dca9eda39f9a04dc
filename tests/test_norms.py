"""The norms compute their papers' equations, with their papers' initial values."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from ultrazoo.nn.norms import SPECS, Derf, DynamicTanh, LayerNorm, NormConfig, RMSNorm

D = 12
MODULES = {spec.name: spec.module for spec in SPECS}


def build(name: str, dtype: torch.dtype = torch.float64, **fields: float) -> torch.nn.Module:
    """A norm with every parameter moved off its initial value."""
    torch.manual_seed(0)
    norm = MODULES[name](NormConfig(hidden_size=D, **fields)).to(dtype)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return norm


def test_the_four_names():
    assert [spec.name for spec in SPECS] == ["layer_norm", "rms_norm", "dynamic_tanh", "derf"]
    assert {spec.kind for spec in SPECS} == {"norm"}


@pytest.mark.parametrize(
    ("module", "names", "count"),
    [
        (LayerNorm, {"weight", "bias"}, 2 * D),
        (RMSNorm, {"weight"}, D),
        (DynamicTanh, {"alpha", "weight", "bias"}, 2 * D + 1),
        (Derf, {"alpha", "shift", "weight", "bias"}, 2 * D + 2),
    ],
)
def test_parameters_and_initial_values(module, names, count):
    values = dict(module(NormConfig(hidden_size=D)).named_parameters())
    assert set(values) == names
    assert sum(value.numel() for value in values.values()) == count
    expected = {"weight": 1.0, "bias": 0.0, "alpha": 0.5, "shift": 0.0}
    for name, value in values.items():
        assert value.eq(expected[name]).all()


def test_layer_norm_equation():
    norm, x = build("layer_norm", norm_eps=0.1), torch.randn(3, 5, D, dtype=torch.float64)
    centred = x - x.mean(-1, keepdim=True)
    expected = norm.weight * centred / (centred.square().mean(-1, keepdim=True) + 0.1).sqrt() + norm.bias
    torch.testing.assert_close(norm(x), expected)


def test_rms_norm_equation():
    norm, x = build("rms_norm", norm_eps=0.1), torch.randn(3, 5, D, dtype=torch.float64)
    torch.testing.assert_close(norm(x), norm.weight * x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt())


def test_dynamic_tanh_equation_and_gradients():
    norm = build("dynamic_tanh")
    x = torch.randn(3, 5, D, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, 5, D, dtype=torch.float64)
    y = norm(x)
    t = torch.tanh(norm.alpha * x)
    torch.testing.assert_close(y, norm.weight * t + norm.bias)
    y.backward(grad)
    u = grad * norm.weight * (1 - t.square())
    torch.testing.assert_close(x.grad, norm.alpha * u)
    torch.testing.assert_close(norm.alpha.grad, (u * x).sum().view(1))
    torch.testing.assert_close(norm.weight.grad, (grad * t).sum((0, 1)))
    torch.testing.assert_close(norm.bias.grad, grad.sum((0, 1)))


def test_derf_equation_and_gradients():
    norm = build("derf")
    x = torch.randn(3, 5, D, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, 5, D, dtype=torch.float64)
    y = norm(x)
    inner = norm.alpha * x + norm.shift
    torch.testing.assert_close(y, norm.weight * torch.erf(inner) + norm.bias)
    y.backward(grad)
    u = grad * norm.weight * 2 / math.sqrt(math.pi) * torch.exp(-inner.square())
    torch.testing.assert_close(x.grad, norm.alpha * u)
    torch.testing.assert_close(norm.alpha.grad, (u * x).sum().view(1))
    torch.testing.assert_close(norm.shift.grad, u.sum().view(1))


@pytest.mark.parametrize("name", ["dynamic_tanh", "derf"])
def test_no_statistics(name):
    norm, x = build(name), torch.randn(2, 3, D, dtype=torch.float64)
    changed = x.clone()
    changed[..., 0] += 100
    torch.testing.assert_close(norm(changed)[..., 1:], norm(x)[..., 1:], rtol=0, atol=0)
    assert norm.has_statistics is False


@pytest.mark.parametrize("name", list(MODULES))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_input_is_computed_in_the_weights_precision(name, dtype):
    norm = build(name, torch.float32)
    x = (torch.randn(4, D) * 3).to(dtype)
    y = norm(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, norm(x.float()).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("name", list(MODULES))
def test_large_half_precision_input_stays_finite(name):
    norm = build(name, torch.float32)
    x = torch.full((2, D), 6e4, dtype=torch.float16, requires_grad=True)
    y = norm(x)
    y.float().square().sum().backward()
    assert y.isfinite().all()
    assert x.grad is not None and x.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in norm.parameters())


def test_width_must_be_positive():
    with pytest.raises(ValidationError, match="hidden_size"):
        NormConfig(hidden_size=0)
