"""The ODE block: order of its integrators, one f throughout, a gradient that recomputing does not change."""

from __future__ import annotations

import itertools

import pytest
import torch
from pydantic import ValidationError

from ultrazoo.blocks.ode import SPEC, Ode, OdeConfig
from ultrazoo.nn.segments import mask_padding
from ultrazoo.ops import attention

ROWS = torch.tensor([[1, 1, 1, 2, 2, 3, 0, 0], [0, 0, 7, 7, 0, 4, 4, 4]])


def block(dtype=torch.float64, gain=1.0, **options):
    torch.manual_seed(0)
    net = Ode(OdeConfig(**{"hidden_size": 8, "num_heads": 2, "initializer_range": 0.4 * gain, **options}))
    torch.nn.init.normal_(net.projections.qkv.bias)
    torch.nn.init.normal_(net.projections.output.bias)
    return net.to(dtype)


def tokens(dtype=torch.float64, scale=1.0):
    torch.manual_seed(1)
    return (torch.randn(2, 8, 8, dtype=torch.float64) * scale).to(dtype)


def field(net, h):
    """f of one document h (L, D), with the softmax written out and positions as complex turns."""
    parts = net.projections
    q, k, v = parts.qkv(h).reshape(len(h), 3, parts.num_heads, -1).unbind(1)
    if parts.rotary:
        pairs = q.shape[2] // 2
        angles = torch.arange(len(h))[:, None] * 10000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
        turn = torch.polar(torch.ones_like(angles), angles)[:, None]
        q, k = (torch.view_as_real(torch.view_as_complex(y.unflatten(2, (-1, 2))) * turn).flatten(2) for y in (q, k))
    weights = torch.softmax(torch.einsum("nhk,mhk->hnm", q, k) * q.shape[2] ** -0.5, -1)
    return parts.output(torch.einsum("hnm,mhk->nhk", weights, v).flatten(1))


def integrate(net, h):
    """h(1) - h(0) of one document by the textbook's formulas."""
    start, dt = h, 1 / net.steps
    for _ in range(net.steps):
        k1 = field(net, h)
        if net.solver == "euler":
            h = h + dt * k1
            continue
        k2 = field(net, h + dt / 2 * k1)
        k3 = field(net, h + dt / 2 * k2)
        k4 = field(net, h + dt * k3)
        h = h + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return h - start


@pytest.mark.parametrize("position_embedding", ["rope", "none"])
@pytest.mark.parametrize("solver, steps", [("rk4", 1), ("rk4", 3), ("euler", 3)])
def test_agrees_with_the_textbook_in_packed_rows(solver, steps, position_embedding):
    net = block(ode_solver=solver, ode_steps=steps, position_embedding=position_embedding)
    x = tokens()
    expected = torch.zeros_like(x)
    for b, row in enumerate(ROWS):
        for document in row[row > 0].unique():
            expected[b, row == document] = integrate(net, x[b, row == document]).detach()
    torch.testing.assert_close(net(x, ROWS), expected)


@pytest.mark.parametrize("solver, order", [("rk4", 4), ("euler", 1)])
def test_order_of_convergence(solver, order):
    x = tokens()
    exact = block(gain=0.5, ode_solver="rk4", ode_steps=128)(x)
    errors = [(block(gain=0.5, ode_solver=solver, ode_steps=n)(x) - exact).norm().item() for n in (8, 16, 32)]
    assert errors[-1] > 1e4 * torch.finfo(x.dtype).eps * exact.norm().item()  # far above rounding
    for coarse, fine in itertools.pairwise(errors):
        assert 0.8 * 2**order < coarse / fine < 1.25 * 2**order


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_euler_with_one_step_is_a_residual_block_bit_for_bit(dtype):
    net, x = block(dtype, ode_solver="euler", ode_steps=1), tokens(dtype)
    for segments in (None, ROWS):
        q, k, v = net.projections.split(mask_padding(x, segments), segments)
        mixed = attention(q, k, v, segments=segments)
        residual = x + mask_padding(net.projections.merge(mixed), segments)
        assert torch.equal(x + net(x, segments), residual)


@pytest.mark.parametrize("solver", ["rk4", "euler"])
@pytest.mark.parametrize("segments", [None, ROWS])
def test_recomputing_changes_no_gradient(solver, segments):
    results = []
    for recompute in (False, True):
        net = block(ode_solver=solver, recompute=recompute, ode_steps=3, dropout=0.25)
        x = tokens().requires_grad_()
        torch.manual_seed(5)
        y = net(x, segments)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in net.parameters())])
    for kept, recomputed in zip(*results, strict=True):
        assert kept.abs().max() > 0
        assert torch.equal(kept, recomputed)


def test_recomputing_keeps_one_state_a_step():
    saved = {}
    for recompute in (False, True):
        net, calls, sizes = block(recompute=recompute, ode_steps=4), [], {}
        net.projections.qkv.register_forward_hook(lambda *_, calls=calls: calls.append(1))

        def pack(tensor, sizes=sizes):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = net(tokens().requires_grad_(), ROWS)
        assert len(calls) == 16
        y.sum().backward()
        assert len(calls) == (32 if recompute else 16)
        saved[recompute] = sum(sizes.values())
    state = 2 * 8 * 8 * 8  # bytes of (B, L, D) in fp64
    # four displacements and the start; the mask and the segments are less than a state
    assert saved[True] <= (4 + 1 + 1) * state
    assert saved[False] >= 16 * 6 * state


@pytest.mark.parametrize("solver", ["rk4", "euler"])
def test_gradients_in_fp64(solver):
    net = block(hidden_size=2, num_heads=1, ode_solver=solver)
    x = torch.randn(2, 7, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: net(x, ROWS[:, 1:]), (x, *net.parameters()))


@pytest.mark.parametrize("solver", ["rk4", "euler"])
def test_dropout_is_one_mask_for_all_stages_and_absent_in_evaluation(solver):
    net, x = block(ode_solver=solver, ode_steps=3, dropout=0.5), tokens()
    # a coordinate that every slope misses does not move at all
    share = torch.stack([(net(x) == 0).double().mean() for _ in range(20)])
    assert 0.4 < share.mean() < 0.6 and share.std() > 0
    net.eval()
    assert (net(x) != 0).all()
    assert torch.equal(net(x), net(x))


def test_padding_and_bidirectionality():
    net, x = block(), tokens()
    alone = net(x[1:2, 5:])
    waste = torch.full((1, 3, 8), float("nan"), dtype=x.dtype)
    padded = net(torch.cat([waste, x[1:2, 5:], waste], 1), torch.tensor([[0] * 3 + [4] * 3 + [0] * 3]))
    torch.testing.assert_close(padded[:, 3:6], alone)
    assert (padded[:, :3] == 0).all() and (padded[:, 6:] == 0).all()
    x.requires_grad_()
    net(x, ROWS)[1, 6].sum().backward()
    assert torch.isfinite(x.grad).all()
    assert {t for t in range(8) if x.grad[1, t].abs().max() > 0} == {5, 6, 7}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1, 100, 3000])
def test_half_precision_stays_finite(dtype, scale):
    y = block(dtype, gain=0.25)(tokens(dtype, scale), ROWS)
    assert y.dtype is dtype
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("segments", [None, ROWS])
def test_autocast_is_near_full_precision(segments):
    net, x = block(gain=0.5, dtype=torch.float32), tokens(torch.float32)
    exact = net(x, segments)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x, segments)
    y.sum().backward()
    assert (y - exact).norm() < 4 * torch.finfo(torch.bfloat16).eps * exact.norm()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().max() > 0 for p in net.parameters())


def test_compiles_in_bitnet_without_a_graph_break_forward_and_backward():
    net, x = block(torch.float32, use_bitnet=True, ode_steps=1), tokens(torch.float32)
    grads = []
    for call in (net, torch.compile(net, fullgraph=True, backend="aot_eager")):
        net.zero_grad()
        y = call(x, ROWS)
        y.square().sum().backward()
        grads.append([y.detach(), net.projections.qkv.weight.grad.clone()])
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("width", [8, 1024])
def test_parameter_count(width):
    def count(use_bitnet):
        return sum(
            p.numel() for p in Ode(OdeConfig(hidden_size=width, num_heads=2, use_bitnet=use_bitnet)).parameters()
        )

    assert count(False) == 4 * width**2 + 4 * width
    assert count(True) == 4 * width**2 + 6 * width  # the norm inside each BitLinear
    assert SPEC.state_size is None


def test_heads_must_divide_the_width():
    with pytest.raises(ValidationError, match="got hidden_size 12 and num_heads 5, expected a multiple"):
        OdeConfig(hidden_size=12, num_heads=5)
    with pytest.raises(ValidationError, match="expected an even number; rotary"):
        OdeConfig(hidden_size=12, num_heads=4)
    OdeConfig(hidden_size=12, num_heads=4, position_embedding="none")


@pytest.mark.optional
def test_one_step_agrees_with_torchdiffeq_classic_rk4():
    rk_common = pytest.importorskip("torchdiffeq._impl.rk_common")
    net, x = block(ode_steps=1), tokens()
    dt = torch.tensor(1.0, dtype=x.dtype)
    moved = rk_common.rk4_step_func(
        lambda t, h, perturb=None: torch.stack([field(net, row) for row in h]), 0.0, dt, 1.0, x
    )
    torch.testing.assert_close(net(x), moved)
