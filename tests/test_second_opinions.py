"""Retention and BitLinear against what others wrote from the same papers, where their packages are installed."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ultrazoo.blocks.retnet import RetNet, RetNetConfig, log_decay
from ultrazoo.nn.bitlinear import NORM_EPS, BitLinear
from ultrazoo.ops import bitlinear, bitlinear_packed, pack_ternary, retention
from ultrazoo.ops.bitlinear.reference import quantize, ternarize
from ultrazoo.ops.library import kernel_policy, kernel_status
from ultrazoo.testing.measure import relative_error

pytestmark = pytest.mark.optional

B, L, H, K, V = 2, 37, 3, 8, 16


@pytest.fixture(params=["reference", "compiled"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test by the references, then by the kernels."""
    if request.param == "compiled" and not kernel_status("ultrazoo::retention", "cpu").compiled:
        pytest.skip("there are no compiled kernels")
    with kernel_policy(request.param):
        yield request.param


@pytest.fixture
def bitnet() -> Iterator[types.ModuleType]:
    """transformers' BitNet layers, run as they are written: they ask for torch.compile, line by line."""
    module = pytest.importorskip("transformers.integrations.bitnet")
    with torch.compiler.set_stance("force_eager"):
        yield module


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def agree(name: str, ours: Tensor, theirs: Tensor, bound: float) -> None:
    """Assert that the largest difference is within ``bound`` of the largest number; ``pytest -s`` shows both."""
    error = relative_error(ours.detach(), theirs.detach())
    print(f"{name}: {error:.1e}")
    assert error <= bound, name


def retention_inputs() -> list[Tensor]:
    return [draw(B, L, H, width, seed=seed).requires_grad_() for seed, width in enumerate((K, K, V))]


def test_causal_retention_agrees_with_flash_linear_attention(kernels: str) -> None:
    naive = pytest.importorskip("fla.ops.retention.naive").naive_retention
    q, k, v = retention_inputs()
    ours = retention(q * K**-0.5, k, v, log_decay(H), causal=True)
    theirs = naive(heads_first(q), heads_first(k), heads_first(v)).transpose(1, 2)
    agree("retention", ours, theirs, 1e-6)
    weight = draw(*ours.shape).cos()
    mine, other = (torch.autograd.grad((o * weight).sum(), (q, k, v)) for o in (ours, theirs))
    for name, a, b in zip("qkv", mine, other, strict=True):
        agree(f"gradient of {name}", a, b, 1e-6)


def torchscale_retention(width: int, eps: float) -> Any:
    module = pytest.importorskip("torchscale.component.multiscale_retention")
    args = types.SimpleNamespace(multiway=False, layernorm_eps=eps)
    return module.MultiScaleRetention(args, width, H * V, H)


def decay_mask(length: int, causal: bool) -> Tensor:
    """(H, L, L) decays over the root of their row's sum, as torchscale's positions have them."""
    index = torch.arange(length, dtype=torch.float32)
    mask = torch.exp((index[:, None] - index).abs() * log_decay(H)[:, None, None])
    mask = mask.tril() if causal else mask
    return mask / mask.sum(dim=-1, keepdim=True).sqrt()


def test_causal_retention_agrees_with_torchscale_in_parallel_and_step_by_step(kernels: str) -> None:
    theirs = torchscale_retention(H * K, 1e-12)
    q, k, v = (x.detach() for x in retention_inputs())
    ours = retention(q, k, v, log_decay(H), causal=True)
    parallel = theirs.parallel_forward(heads_first(q), heads_first(k), v.flatten(2), decay_mask(L, causal=True))
    mine, other = (F.rms_norm(o, (V,), eps=1e-12) for o in (ours, parallel))  # which takes their factor a row out
    agree("parallel, normed", mine, other, 2e-6)
    state: dict[str, Tensor] = {}
    decay = log_decay(H).exp()
    for n in range(L):
        at = (heads_first(x[:, n : n + 1]) for x in (q, k))
        step = theirs.recurrent_forward(*at, v[:, n].flatten(1), decay, state)  # over the root of the decays' sum
        agree(f"step {n}", ours[:, n], step * state["scale"].sqrt()[:, None], 1e-6)


def test_the_retention_block_agrees_with_torchscale(kernels: str) -> None:
    torch.manual_seed(0)
    width, eps = H * K, 1e-12  # theirs scales before the norm, whose eps must not count then
    ours = RetNet(RetNetConfig(hidden_size=width, retention_heads=H, norm_eps=eps))
    theirs = torchscale_retention(width, eps)
    theirs.load_state_dict(ours.state_dict())
    x = draw(B, L, width).requires_grad_()
    angles = torch.arange(L)[:, None] * (10000.0 ** -torch.linspace(0, 1, K // 2)).repeat_interleave(2)
    found = theirs(x, ((angles.sin(), angles.cos()), decay_mask(L, causal=False)))
    agree("block", ours(x), found, 2e-6)
    weight = draw(B, L, width).cos()
    wrt = [(name, a, theirs.get_parameter(name)) for name, a in ours.named_parameters()]
    mine = torch.autograd.grad((ours(x) * weight).sum(), (x, *(a for _, a, _ in wrt)))
    other = torch.autograd.grad((found * weight).sum(), (x, *(b for _, _, b in wrt)))
    for name, a, b in zip(("x", *(name for name, _, _ in wrt)), mine, other, strict=True):
        agree(f"gradient of {name}", a, b, 2e-6)


@pytest.mark.parametrize("clamped", [False, True], ids=["usual", "under eps"])
def test_bitlinear_agrees_with_transformers_in_training(kernels: str, bitnet: types.ModuleType, clamped: bool) -> None:
    theirs = bitnet.AutoBitLinear(48, 33, bias=True, online_quant=True)
    weight, bias, x = theirs.weight, theirs.bias, draw(5, 7, 48)
    with torch.no_grad():
        weight.copy_(0.1 * draw(33, 48, seed=1))
        if clamped:  # max |x| and mean |W| are less than the 1e-5 that they count for, and codes are not all 0
            x, weight[:], bias[:] = 1e-6 * x, 1e-4 * weight, 0
    wrt = (x.requires_grad_(), weight, bias)
    ours, found = bitlinear(x, weight, bias), theirs(x)
    assert found.detach().abs().max() > 0
    agree("bitlinear", ours, found, 1e-6)
    cotangent = draw(5, 7, 33, seed=2)
    mine, other = (torch.autograd.grad((y * cotangent).sum(), wrt) for y in (ours, found))
    for name, a, b in zip(("x", "weight", "bias"), mine, other, strict=True):
        agree(f"gradient of {name}", a, b, 1e-6)


def test_the_bitlinear_layer_agrees_with_transformers(kernels: str, bitnet: types.ModuleType) -> None:
    torch.manual_seed(0)
    theirs = bitnet.AutoBitLinear(48, 33, online_quant=True, use_rms_norm=True, rms_norm_eps=NORM_EPS)
    ours = BitLinear(48, 33)
    with torch.no_grad():
        ours.norm.weight.copy_(1 + 0.1 * draw(48))
    theirs.load_state_dict({name.replace("norm.", "rms_norm."): value for name, value in ours.state_dict().items()})
    x = draw(5, 7, 48)
    agree("layer", ours(x), theirs(x), 1e-6)


def test_packed_bitlinear_agrees_with_transformers(kernels: str, bitnet: types.ModuleType) -> None:
    n, k = 36, 48  # their packing wants a multiple of four rows
    weight, bias, x = 0.02 * draw(n, k, seed=1), draw(n, seed=2), draw(5, 7, k)
    inverse = 1 / weight.abs().mean()
    theirs = bitnet.BitLinear(k, n, bias=True, dtype=torch.float32)
    theirs.load_state_dict(
        {
            "weight": bitnet.pack_weights((weight * inverse).round().clamp(-1, 1)),
            "weight_scale": inverse.reshape(1),
            "bias": bias,
        }
    )
    agree("packed", bitlinear_packed(x, *pack_ternary(weight), bias), theirs(x), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bitlinear_in_halves_is_as_exact_as_transformers(
    kernels: str, bitnet: types.ModuleType, dtype: torch.dtype
) -> None:
    """Ours sums the integers and then scales; theirs scales, rounds to halves and then sums. Both round about once.

    Halves often lie midway between two integers, where the fp32 product with 127 / max |x| decides, for both alike.
    """
    theirs = bitnet.AutoBitLinear(256, 64, bias=False, online_quant=True, dtype=dtype)
    x, weight = draw(32, 256).to(dtype), draw(64, 256, seed=1).to(dtype)
    theirs.weight.data.copy_(weight)
    integers, token_scale = quantize(x, 1e-5)
    codes, scale = ternarize(weight, 1e-5)
    exact = integers.double() @ codes.double().mT * token_scale * scale
    for name, y in (("ours", bitlinear(x, weight)), ("theirs", theirs(x))):
        agree(f"{dtype}, {name}", y, exact, torch.finfo(dtype).eps)
