"""The selective scan block: its equations, written token by token, in both directions and for each document."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from ultrazoo.blocks.mamba import SPEC, Mamba, MambaConfig
from ultrazoo.nn.bitlinear import BitLinear

ROWS = torch.tensor([[1, 1, 1, 1, 1, 2, 2, 2, 3, 0, 0], [0, 0, 7, 7, 7, 0, 4, 4, 4, 4, 4]])


def block(dtype=torch.float64, **options):
    torch.manual_seed(0)
    return Mamba(MambaConfig(**{"hidden_size": 12, "d_state": 5, **options})).to(dtype)


def tokens(dtype=torch.float64, scale=1.0):
    torch.manual_seed(1)
    return (torch.randn(*ROWS.shape, 12, dtype=torch.float64) * scale).to(dtype)


def one_direction(scan, x, z):
    """The paper's recurrence over one document; x and z (L, E) already in the direction of reading."""
    taps = scan.conv.weight.shape[2]
    weight = scan.conv.weight[:, 0].flip(1) if scan.reverse else scan.conv.weight[:, 0]
    past = F.pad(x, (0, 0, taps - 1, 0))
    u = F.silu(torch.stack([(past[t : t + taps].T * weight).sum(1) for t in range(len(x))]) + scan.conv.bias)
    dt, B, C = (u @ scan.x_proj.weight.T).split(scan.sizes, 1)
    delta = F.softplus(scan.dt_proj(dt))
    A = -torch.exp(scan.A_log)
    h, y = torch.zeros_like(A), []
    for t in range(len(x)):
        h = torch.exp(delta[t, :, None] * A) * h + (delta[t] * u[t])[:, None] * B[t]
        y.append(h @ C[t] + scan.D * u[t])
    return torch.stack(y) * F.silu(z)


def whole_block(net, x):
    """The block's equations for one document x (L, D)."""
    u, z = (x @ net.in_proj.weight.T).chunk(2, 1)
    back = one_direction(net.back, u.flip(0), z.flip(0)).flip(0)
    return (one_direction(net.ahead, u, z) + back) @ net.out_proj.weight.T


@pytest.mark.parametrize("options", [{}, {"d_conv": 1, "expand": 1, "dt_rank": 3}])
def test_agrees_with_the_equations_document_by_document(options):
    net, x = block(**options), tokens()
    expected = torch.zeros_like(x)
    for b, row in enumerate(ROWS):
        for document in row[row > 0].unique():
            expected[b, row == document] = whole_block(net, x[b, row == document]).detach()
    torch.testing.assert_close(net(x, ROWS), expected)
    torch.testing.assert_close(net(x)[1], whole_block(net, x[1]))


def test_reversal_of_the_row_is_reversal_of_the_output_when_directions_share_weights():
    net, x = block(), tokens()
    state = net.ahead.state_dict()
    net.back.load_state_dict({**state, "conv.weight": state["conv.weight"].flip(2)})
    torch.testing.assert_close(net(x.flip(1)), net(x).flip(1))


def test_padding_leaks_neither_bias_nor_values_from_either_side():
    net, x = block(), tokens()
    with torch.no_grad():
        net.ahead.conv.bias.fill_(3.0)
        net.back.conv.bias.fill_(-2.0)
    document = x[1:2, 6:]
    alone = net(document)
    waste = torch.full((1, 6, 12), float("nan"), dtype=x.dtype)
    padded = net(torch.cat([waste, document, waste], 1), torch.tensor([[0] * 6 + [4] * 5 + [0] * 6]))
    torch.testing.assert_close(padded[:, 6:11], alone)
    assert (padded[:, :6] == 0).all() and (padded[:, 11:] == 0).all()
    torch.testing.assert_close(net(x, ROWS)[1:2, 6:], alone)


def test_reads_both_sides_of_its_document_and_nothing_else():
    net, x = block(), tokens().requires_grad_()
    net(x, ROWS)[1, 8].sum().backward()
    assert {t for t in range(11) if x.grad[1, t].abs().max() > 0} == {6, 7, 8, 9, 10}
    assert x.grad[0].abs().max() == 0


def test_gradients_in_fp64():
    net = block(hidden_size=2, d_state=3)
    x = torch.randn(2, 7, 2, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        for scan in (net.ahead, net.back):
            scan.dt_proj.bias.zero_()  # deltas near 0.7: the recurrence must matter
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


@pytest.mark.parametrize("width, options", [(12, {}), (40, {"d_state": 8, "d_conv": 3, "expand": 3, "dt_rank": 5})])
def test_parameter_count(width, options):
    config = MambaConfig(hidden_size=width, **options)
    inner, state, taps = config.expand * width, config.d_state, config.d_conv
    rank = options.get("dt_rank", math.ceil(width / 16))
    one_way = inner * (taps + 1) + inner * (rank + 2 * state) + rank * inner + inner + inner * state + inner
    expected = 3 * width * inner + 2 * one_way
    assert sum(p.numel() for p in Mamba(config).parameters()) == expected
    bitnet = Mamba(MambaConfig(hidden_size=width, use_bitnet=True, **options))
    assert sum(p.numel() for p in bitnet.parameters()) == expected + width + inner
    assert {name for name, part in bitnet.named_modules() if isinstance(part, BitLinear)} == {"in_proj", "out_proj"}
    assert SPEC.state_size(config) == 2 * inner * (state + taps - 1)


def test_initial_values_are_those_of_the_paper():
    torch.manual_seed(0)
    net = Mamba(MambaConfig(hidden_size=64, num_layers=6, num_loops=2))
    for scan in (net.ahead, net.back):
        torch.testing.assert_close(-torch.exp(scan.A_log), -torch.arange(1.0, 17).expand(128, 16))
        assert (scan.D == 1).all()
        delta = F.softplus(scan.dt_proj.bias)
        assert delta.min() >= 0.99e-3 and delta.max() <= 1.01e-1
        assert abs(delta.log().mean().item() - math.log(1e-2)) < 0.4
        assert 0.45 < scan.dt_proj.weight.abs().max() <= 0.5  # 4^-0.5
        flagged = {name for name, p in scan.named_parameters() if getattr(p, "_no_weight_decay", False)}
        assert flagged == {"A_log", "D", "dt_proj.bias"}
    bound = 128**-0.5 / math.sqrt(12)
    assert 0.99 * bound < net.out_proj.weight.abs().max() <= bound


def test_deltas_out_of_order_are_refused():
    with pytest.raises(ValidationError, match=r"got dt_min 0\.5 with dt_max 0\.1"):
        MambaConfig(hidden_size=8, dt_min=0.5)


@pytest.mark.optional
def test_one_direction_agrees_with_transformers():
    modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    net = block(torch.float32, dt_rank=2)
    theirs = modeling.MambaMixer(
        modeling.MambaConfig(hidden_size=12, state_size=5, conv_kernel=4, expand=2, time_step_rank=2, use_bias=False),
        layer_idx=0,
    )
    scan = net.ahead
    with torch.no_grad():
        net.back.D.zero_()
        net.back.x_proj.weight.zero_()  # the other direction adds nothing: B = C = 0
        theirs.in_proj.weight.copy_(net.in_proj.weight)
        theirs.conv1d.weight.copy_(scan.conv.weight)
        theirs.conv1d.bias.copy_(scan.conv.bias)
        theirs.x_proj.weight.copy_(scan.x_proj.weight)
        theirs.dt_proj.weight.copy_(scan.dt_proj.weight)
        theirs.dt_proj.bias.copy_(scan.dt_proj.bias)
        theirs.A_log.copy_(scan.A_log)
        theirs.D.copy_(scan.D)
        theirs.out_proj.weight.copy_(net.out_proj.weight)
        x = tokens(torch.float32)
        torch.testing.assert_close(net(x), theirs(x))
