"""BitLinear computes BitNet b1.58 on a normed input, with straight-through gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ultrazoo.nn import bitlinear as layers
from ultrazoo.nn.bitlinear import BitLinear, PackedBitLinear, int8_ste, make_linear, pack, ternary_ste
from ultrazoo.ops import bitlinear

D, OUT = 24, 10


def build(bias: bool = True) -> BitLinear:
    torch.manual_seed(0)
    layer = BitLinear(D, OUT, bias).double()
    nn.init.normal_(layer.norm.weight, mean=1, std=0.3)
    return layer


def quantised(layer: BitLinear, x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations and weights as the equations have them, without gradient."""
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.norm.weight
    t = 127 / normed.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    s = 1 / layer.weight.abs().mean().clamp(min=1e-5)
    return (normed * t).round().clamp(-128, 127) / t, (layer.weight * s).round().clamp(-1, 1) / s


def test_make_linear_chooses():
    plain, bit = make_linear(D, OUT), make_linear(D, OUT, bias=False, bitnet=True)
    assert type(plain) is nn.Linear and plain.bias is not None
    assert isinstance(bit, BitLinear) and isinstance(bit, nn.Linear) and bit.bias is None


def test_parameters_are_those_of_linear_and_a_gain():
    torch.manual_seed(3)
    plain = nn.Linear(D, OUT)
    torch.manual_seed(3)
    bit = BitLinear(D, OUT)
    assert {name: tuple(p.shape) for name, p in bit.named_parameters()} == {
        "weight": (OUT, D),
        "bias": (OUT,),
        "norm.weight": (D,),
    }
    assert bit.weight.equal(plain.weight) and bit.bias.equal(plain.bias) and bit.norm.weight.eq(1).all()


@pytest.mark.parametrize("bias", [True, False])
def test_equation(bias):
    layer, x = build(bias), torch.randn(3, 5, D, dtype=torch.float64)
    xq, wq = quantised(layer, x)
    assert len(wq.unique()) == 3 and (xq / xq.abs().amax(-1, keepdim=True) * 127).round().abs().max() == 127
    torch.testing.assert_close(layer(x), F.linear(xq, wq, layer.bias))


def test_gradients_pass_straight_through():
    layer, x = build(), torch.randn(6, D, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(6, OUT, dtype=torch.float64)
    got = torch.autograd.grad(layer(x), [x, layer.weight, layer.bias, layer.norm.weight], grad)
    xq, wq = (value.detach() for value in quantised(layer, x))
    normed = F.rms_norm(x, (D,), layer.norm.weight, 1e-5)
    grad_x, grad_gain = torch.autograd.grad(normed, [x, layer.norm.weight], grad @ wq)
    torch.testing.assert_close(got, (grad_x, grad.T @ xq, grad.sum(0), grad_gain))


def test_tokens_do_not_see_each_other():
    layer, x = build(), torch.randn(2, 4, D, dtype=torch.float64)
    changed = x.clone()
    changed[0, 1] *= 1000
    keep = torch.ones(2, 4, dtype=torch.bool)
    keep[0, 1] = False
    assert layer(changed)[keep].equal(layer(x)[keep])


def test_input_size_does_not_matter_and_zero_gives_the_bias():
    layer, x = build(), torch.randn(4, D, dtype=torch.float64) + 3
    torch.testing.assert_close(layer(x * 1000), layer(x), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(layer(torch.zeros(2, D, dtype=torch.float64)), layer.bias.expand(2, OUT))


def test_autocast_computes_in_its_dtype_and_keeps_fp32_gradients():
    layer = build().float()
    x = torch.randn(16, D)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_modules_work_and_stay_finite(dtype):
    layer, x = build().to(dtype), torch.full((3, D), 6e4).to(dtype)
    y = layer(x)
    assert y.dtype == dtype and y.isfinite().all()


@pytest.mark.parametrize("shape", [(0, D), (2, 0, D), (1, D), (D,)])
def test_odd_shapes(shape):
    assert build()(torch.ones(shape, dtype=torch.float64)).shape == (*shape[:-1], OUT)


def test_the_straight_through_helpers_agree_with_the_op():
    torch.manual_seed(0)
    x = torch.randn(5, D, dtype=torch.float64, requires_grad=True)
    w = torch.randn(OUT, D, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(5, OUT, dtype=torch.float64)
    helpers, op = int8_ste(x) @ ternary_ste(w).T, bitlinear(x, w)
    torch.testing.assert_close(helpers, op)
    torch.testing.assert_close(torch.autograd.grad(helpers, [x, w], grad), torch.autograd.grad(op, [x, w], grad))
    stacked = torch.stack((w, 5 * w)).detach()
    torch.testing.assert_close(ternary_ste(stacked), torch.stack((ternary_ste(w), 5 * ternary_ste(w))))


def test_compiles_into_one_graph_and_round_trips():
    layer, other = build(), build()
    nn.init.zeros_(other.weight)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, D, dtype=torch.float64)
    assert other(x).equal(layer(x))
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_model_gives_the_same_outputs_at_a_sixteenth_of_the_weights(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(BitLinear(48, 40), nn.GELU(), nn.Sequential(BitLinear(40, 7, bias=False)), nn.Linear(7, 3))
    x = torch.randn(2, 5, 48)
    before = sum(layer.weight.numel() * 4 for layer in model.modules() if isinstance(layer, BitLinear))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        expected = model(x)
        packed = pack(model)
        rounding = 8 * torch.finfo(dtype).eps  # the two sum in the same integers, and round where their dtypes say
        torch.testing.assert_close(packed(x), expected, rtol=rounding, atol=rounding)
    assert packed is model and not any(isinstance(layer, BitLinear) for layer in model.modules())
    after = sum(layer.packed.numel() for layer in model.modules() if isinstance(layer, PackedBitLinear))
    assert after <= before / 16 * 1.5  # tiles of 16 x 16 round 40 and 7 rows up
    assert isinstance(pack(BitLinear(8, 8)), PackedBitLinear)


def test_a_packed_layer_keeps_its_state():
    first, second = (PackedBitLinear(BitLinear(20, 12)) for _ in range(2))
    second.load_state_dict(first.state_dict())
    x = torch.randn(3, 20)
    assert torch.equal(first(x), second(x))


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The weights that were quantised for keeping, in their order."""
    seen: list[Tensor] = []
    original = layers.pack_ternary
    monkeypatch.setattr(layers, "pack_ternary", lambda w, *, eps: (seen.append(w), original(w, eps=eps))[1])
    return seen


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ternary_weight_is_kept_while_the_weight_is_unchanged(packings: list[Tensor], dtype: torch.dtype) -> None:
    layer, x = build().to(dtype), torch.randn(7, D, dtype=dtype)

    def fresh() -> Tensor:
        return bitlinear(layer.norm(x), layer.weight, layer.bias)

    assert torch.equal(layer(x), fresh()) and torch.equal(layer(x), fresh()) and len(packings) == 1
    layer.weight.mul_(-2)
    assert torch.equal(layer(x), fresh()) and torch.equal(layer(x), fresh()) and len(packings) == 2
    layer.weight.data.neg_()  # torch does not count this write: eval() makes it known
    assert torch.equal(layer.eval()(x), fresh()) and len(packings) == 3
    layer.load_state_dict(build().state_dict())
    assert torch.equal(layer(x), fresh()) and len(packings) == 4


def test_nothing_is_kept_where_a_gradient_may_be_asked_for(packings: list[Tensor]) -> None:
    layer, x = build().float(), torch.randn(7, D)
    layer(x).sum().backward()
    with torch.inference_mode():
        layer(x)
    assert layer.weight.grad is not None and len(packings) == 1
