"""Retention for an encoder: its three forms agree, each head is normed by itself, documents stay apart."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from ultrazoo.blocks.retnet import SPEC, RetNet, RetNetConfig, log_decay

ROWS = torch.tensor([[1, 1, 1, 1, 1, 2, 2, 2, 3, 0, 0], [0, 0, 7, 7, 7, 0, 4, 4, 4, 4, 4]])


def block(dtype=torch.float64, **options):
    torch.manual_seed(0)
    return RetNet(RetNetConfig(**{"hidden_size": 16, "retention_heads": 2, **options})).to(dtype)


def tokens(dtype=torch.float64, scale=1.0):
    torch.manual_seed(1)
    return (torch.randn(*ROWS.shape, 16, dtype=torch.float64) * scale).to(dtype)


def heads_of(net, x):
    """Queries and keys turned as complex numbers, and values, of one document x (L, D)."""
    width = x.shape[1] // net.heads
    frequencies = torch.tensor([10000.0 ** -(j / max(width // 2 - 1, 1)) for j in range(width // 2)])
    turn = torch.polar(torch.ones(len(x), width // 2).double(), torch.arange(len(x))[:, None] * frequencies.double())

    def turned(y):
        pairs = torch.view_as_complex(y.reshape(len(x), net.heads, -1, 2)) * turn[:, None]
        return torch.view_as_real(pairs).flatten(2)

    q, k = turned(x @ net.q_proj.weight.T), turned(x @ net.k_proj.weight.T) / math.sqrt(width)
    return q, k, (x @ net.v_proj.weight.T).reshape(len(x), net.heads, -1)


def parallel_form(q, k, v, gamma):
    distance = (torch.arange(len(q))[:, None] - torch.arange(len(q))).abs()
    decay = gamma[:, None, None] ** distance
    return torch.einsum("hnm,mhv->nhv", torch.einsum("nhk,mhk->hnm", q, k) * decay, v)


def recurrent_form(q, k, v, gamma):
    o = torch.zeros_like(v)
    state = torch.zeros(q.shape[1], q.shape[2], v.shape[2], dtype=q.dtype)
    for n in range(len(q)):
        state = gamma[:, None, None] * state + k[n, :, :, None] * v[n, :, None, :]
        o[n] += torch.einsum("hk,hkv->hv", q[n], state)
    state = torch.zeros_like(state)
    for n in reversed(range(len(q))):
        o[n] += torch.einsum("hk,hkv->hv", q[n], gamma[:, None, None] * state)
        state = gamma[:, None, None] * state + k[n, :, :, None] * v[n, :, None, :]
    return o


def whole_block(net, x, form):
    """The block's equation for one document x (L, D)."""
    o = form(*heads_of(net, x), log_decay(net.heads).double().exp())
    o = o / torch.sqrt(o.square().mean(-1, keepdim=True) + net.norm_eps)
    gate = x @ net.g_proj.weight.T
    return (gate * torch.sigmoid(gate) * o.flatten(1)) @ net.out_proj.weight.T


@pytest.mark.parametrize("form", [parallel_form, recurrent_form])
@pytest.mark.parametrize("chunk_size", [None, 1, 3, 64])
def test_chunkwise_parallel_and_recurrent_forms_agree_in_packed_rows(form, chunk_size):
    net, x = block(chunk_size=chunk_size), tokens()
    expected = torch.zeros_like(x)
    for b, row in enumerate(ROWS):
        for document in row[row > 0].unique():
            expected[b, row == document] = whole_block(net, x[b, row == document], form).detach()
    torch.testing.assert_close(net(x, ROWS), expected)


def test_decays_are_those_of_the_paper_to_fp32():
    expected = [math.log1p(-(2.0 ** (-5 - h))) for h in range(16)]
    torch.testing.assert_close(log_decay(16).double(), torch.tensor(expected).double(), rtol=2e-7, atol=0)
    assert log_decay(16).dtype is torch.float32


def test_halving_the_module_does_not_round_the_decays_to_one():
    net, x = block(torch.bfloat16, retention_heads=8), tokens(torch.bfloat16)
    exact = block(retention_heads=8)
    exact.load_state_dict(net.state_dict())
    assert (net(x).double() - exact(x.double())).abs().max() < 0.03 * exact(x.double()).abs().max()


def test_each_head_is_normed_by_itself():
    net, x = block(norm_eps=1e-12), tokens()
    before = net(x)
    with torch.no_grad():
        net.v_proj.weight[:16] *= 100  # the first of two heads
    torch.testing.assert_close(net(x), before, rtol=1e-5, atol=1e-9)


def test_packing_and_padding_change_nothing():
    net, x = block(), tokens()
    alone = net(x[1:2, 6:])
    torch.testing.assert_close(net(x, ROWS)[1:2, 6:], alone)
    padded = torch.cat([x[1:2, 6:], torch.full((1, 4, 16), float("nan"), dtype=x.dtype)], 1)
    longer = net(padded, torch.tensor([[4] * 5 + [0] * 4]))
    torch.testing.assert_close(longer[:, :5], alone)
    assert (longer[:, 5:] == 0).all()


def test_reads_both_sides_of_its_document_and_nothing_else():
    net, x = block(), tokens().requires_grad_()
    net(x, ROWS)[1, 8].sum().backward()
    assert {t for t in range(11) if x.grad[1, t].abs().max() > 0} == {6, 7, 8, 9, 10}
    assert x.grad[0].abs().max() == 0


def test_gradients_in_fp64():
    net = block(hidden_size=4, retention_heads=1)
    x = torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: net(x, ROWS[:, 2:9]), (x, *net.parameters()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1, 100, 3000])
def test_half_precision_stays_finite(dtype, scale):
    y = block(dtype)(tokens(dtype, scale), ROWS)
    assert y.dtype is dtype
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("segments", [None, ROWS])
def test_autocast_is_near_full_precision(segments):
    net, x = block(dtype=torch.float32), tokens(torch.float32)
    exact = net(x, segments)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x, segments)
    y.sum().backward()
    assert (y - exact).norm() < 4 * torch.finfo(torch.bfloat16).eps * exact.norm()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().max() > 0 for p in net.parameters())


def test_compiles_in_bitnet_without_a_graph_break():
    net, x = block(torch.float32, use_bitnet=True), tokens(torch.float32)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, ROWS), net(x, ROWS))


@pytest.mark.parametrize("width, heads, factor", [(16, 2, 2), (48, 3, 1), (1024, 8, 2)])
def test_parameter_count(width, heads, factor):
    def count(use_bitnet):
        config = RetNetConfig(hidden_size=width, retention_heads=heads, value_factor=factor, use_bitnet=use_bitnet)
        return sum(p.numel() for p in RetNet(config).parameters())

    projections = (2 + 3 * factor) * width**2
    assert count(False) == projections
    assert count(True) == projections + (4 + factor) * width  # the norm inside each BitLinear


def test_initial_values_and_state_size():
    net = RetNet(RetNetConfig(hidden_size=256, retention_heads=4))
    for projection, gain in ((net.q_proj, 2**-2.5), (net.v_proj, 2**-2.5), (net.g_proj, 2**-2.5), (net.out_proj, 0.5)):
        bound = gain * math.sqrt(6 / sum(projection.weight.shape))
        assert 0.99 * bound < projection.weight.abs().max() <= bound
    assert SPEC.state_size(RetNetConfig(hidden_size=256, retention_heads=4)) == 2 * 4 * 64 * 128


def test_heads_of_odd_width_are_refused():
    with pytest.raises(ValidationError, match="got hidden_size 18 with 6 retention_heads, expected an even width"):
        RetNetConfig(hidden_size=18, retention_heads=6)
