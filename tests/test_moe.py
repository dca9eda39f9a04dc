"""The mixture of experts against a loop over tokens, and its losses, padding, and gradients."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from ultrazoo.nn.bitlinear import int8_ste, ternary_ste
from ultrazoo.nn.mlp import MLP, MLPConfig
from ultrazoo.nn.moe import MoE, MoEConfig, grouped_matmul, grouped_outer
from ultrazoo.nn.tiles import ROW_TILE

D, WIDTH, E, K = 6, 10, 5, 2


def build(**fields: object) -> MoE:
    torch.manual_seed(0)
    values = {"hidden_size": D, "ffn_hidden_size": WIDTH, "num_experts": E, "top_k_experts": K, **fields}
    moe = MoE(MoEConfig.model_validate(values)).double()
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.4)
    return moe


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    segments = torch.tensor([[1] * 5 + [2] * 4, [3] * 6 + [0] * 3, [0] * 9])
    return torch.randn(3, 9, D, dtype=torch.float64, requires_grad=True), segments


def one_token(moe: MoE, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, chosen experts and probabilities of one vector x (D,), by the equations."""
    logits = moe.router.weight @ x
    probs = logits.exp() / logits.exp().sum()
    top, experts = probs.topk(moe.config.top_k_experts)
    y = torch.zeros_like(x)
    weights = top if len(top) == 1 else top / top.sum()
    for weight, e in zip(weights, experts.tolist(), strict=True):
        h, up, down = x, moe.up[e], moe.down[e]
        if moe.up_gain is not None:
            h = int8_ste(h / (h.square().mean() + 1e-5).sqrt() * moe.up_gain[e])
            up, down = ternary_ste(up), ternary_ste(down)
        h = F.gelu(up @ h + moe.up_bias[e])
        if moe.down_gain is not None:
            h = int8_ste(h / (h.square().mean() + 1e-5).sqrt() * moe.down_gain[e])
        y = y + weight * (down @ h + moe.down_bias[e])
    return y, experts, probs


def dense(moe: MoE, x: Tensor, segments: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    """The whole block by a loop over tokens."""
    coef_balance, coef_z = moe.config.router_aux_loss_coef, moe.config.router_z_loss_coef
    rows, visits, probs, z = [], torch.zeros(E).double(), [], []
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            if segments is not None and segments[b, t] == 0:
                rows.append(torch.zeros(D).double())
                continue
            y, experts, p = one_token(moe, x[b, t])
            rows.append(y)
            visits += F.one_hot(experts, E).sum(0)
            probs.append(p)
            z.append((moe.router.weight @ x[b, t]).logsumexp(0) ** 2)
    load, mean_prob = visits / visits.sum(), coef_balance * E * torch.stack(probs).mean(0)
    aux = {
        "moe_balance_loss": (load * mean_prob).sum(),
        "moe_balance_factors": torch.stack((load, mean_prob)),
        "moe_z_loss": coef_z * torch.stack(z).mean(),
        "moe_load": load,
    }
    return torch.stack(rows).view(x.shape), aux


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("bitnet", [True, False])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_equals_a_loop_over_tokens_in_value_and_every_gradient(packed, bitnet, k):
    moe = build(use_bitnet=bitnet, top_k_experts=k)
    x, segments = inputs()
    results = []
    for function in (moe, lambda x, segments: dense(moe, x, segments)):
        y, aux = function(x, segments if packed else None)
        objective = (y * torch.linspace(-1, 1, y.numel()).double().view(y.shape)).sum()
        objective = objective + 7 * aux["moe_balance_loss"] + 5 * aux["moe_z_loss"]
        grads = torch.autograd.grad(objective, [x, *moe.parameters()])
        results.append((y, aux, grads))
    (y, aux, grads), (expected_y, expected_aux, expected_grads) = results
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(aux, expected_aux)
    torch.testing.assert_close(grads, expected_grads)
    assert all(grad.ne(0).any() for grad in grads)


def test_gradcheck():
    moe = build()
    x, segments = inputs()
    assert torch.autograd.gradcheck(lambda x: moe(x, segments)[0], (x,), atol=1e-6)


def test_padding_is_not_routed():
    moe = build()
    x, segments = inputs()
    y, aux = moe(x, segments)
    assert y[segments.eq(0)].eq(0).all()
    poisoned = x.detach().masked_fill(segments.eq(0).unsqueeze(2), torch.nan)
    again, aux_again = moe(poisoned, segments)
    assert again.equal(y)
    torch.testing.assert_close(aux_again, aux, rtol=0, atol=0)
    assert torch.autograd.grad(y.sum() + aux["moe_z_loss"], x)[0][segments.eq(0)].eq(0).all()


def test_a_batch_of_padding_alone_gives_zeros():
    moe = build()
    x = torch.randn(2, 3, D, dtype=torch.float64)
    y, aux = moe(x, torch.zeros(2, 3, dtype=torch.int64))
    assert y.eq(0).all()
    assert aux["moe_balance_loss"] == 0 and aux["moe_z_loss"] == 0 and aux["moe_load"].eq(0).all()
    assert moe(x[:0], None)[0].shape == (0, 3, D)


@pytest.mark.parametrize("k", [1, 2])
def test_balance_loss_is_its_coefficient_at_perfect_balance(k):
    moe = build(num_experts=4, top_k_experts=k, router_aux_loss_coef=0.03, hidden_size=4)
    nn.init.eye_(moe.router.weight)
    x = torch.eye(4).double() + torch.eye(4).double().roll(1, 1) * 0.5  # token i prefers experts i, then i + 1
    _, aux = moe(x.unsqueeze(0))
    torch.testing.assert_close(aux["moe_load"], torch.full((4,), 0.25).double())
    assert aux["moe_balance_loss"].item() == pytest.approx(0.03)
    _, aux = moe(x[:1].expand(1, 8, 4) * 50)  # all tokens alike: the loss grows to E / k times the coefficient
    assert aux["moe_balance_loss"].item() == pytest.approx(0.03 * 4 / k, rel=1e-3)


def test_one_expert_is_the_dense_feed_forward():
    moe, mlp = build(num_experts=1, top_k_experts=1), MLP(MLPConfig(hidden_size=D, ffn_hidden_size=WIDTH)).double()
    values = {"up.weight": moe.up, "up.bias": moe.up_bias, "down.weight": moe.down, "down.bias": moe.down_bias}
    mlp.load_state_dict({name: value[0] for name, value in values.items()})
    x, _ = inputs()
    torch.testing.assert_close(moe(x)[0], mlp(x)[0])


def test_the_router_works_in_fp32_under_autocast():
    torch.manual_seed(0)
    moe = MoE(MoEConfig(hidden_size=D, ffn_hidden_size=WIDTH, num_experts=E, initializer_range=0.5))
    x, segments = inputs()
    x = x.detach().float()
    expected, expected_aux = moe(x, segments)
    with torch.autocast("cpu", torch.bfloat16):
        y, aux = moe(x, segments)
    torch.testing.assert_close(aux, expected_aux, rtol=0, atol=0)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)


def test_compiles_into_one_graph():
    moe = build(use_bitnet=True)
    x, segments = inputs()
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    for row in (segments, segments.flip(0).flip(1)):  # other group sizes, same graph
        y, aux = compiled(x, row)
        expected, expected_aux = moe(x, row)
        torch.testing.assert_close((y, aux), (expected, expected_aux))
        grads = torch.autograd.grad(y.sum(), [x, *moe.parameters()], allow_unused=True)
        expected_grads = torch.autograd.grad(expected.sum(), [x, *moe.parameters()], allow_unused=True)
        torch.testing.assert_close(grads, expected_grads)


def test_two_runs_are_bit_equal():
    moe = build().float()
    x, segments = inputs()
    x = x.detach().float().requires_grad_()
    runs = [torch.autograd.grad(moe(x, segments)[0].square().sum(), [x, *moe.parameters()]) for _ in range(2)]
    assert all(a.equal(b) for a, b in zip(*runs, strict=True))


def test_grouped_products_pass_opcheck_with_empty_groups_and_rest():
    x = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    ends = torch.tensor([4, 4, 7])
    torch.library.opcheck(grouped_matmul, (x, weight, ends))
    torch.library.opcheck(grouped_outer, (torch.randn(9, 5).double(), x.detach(), ends))
    y = grouped_matmul(x, weight, ends)
    expected = torch.cat((x[:4] @ weight[0].T, x[4:7] @ weight[2].T, torch.zeros(2, 5).double()))
    torch.testing.assert_close(y, expected)
    assert torch.autograd.gradcheck(lambda x, w: grouped_matmul(x, w, ends), (x, weight))


def test_more_visits_than_experts_is_an_error():
    with pytest.raises(ValidationError, match="got top_k_experts 3 with num_experts 2, expected at most"):
        MoEConfig(hidden_size=4, ffn_hidden_size=8, num_experts=2, top_k_experts=3)


def test_experts_multiply_whole_tiles_of_rows_whatever_the_tokens_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    moe, sizes = build(), set()

    def spy(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        sizes.update(ends.diff(prepend=ends.new_zeros(1)).tolist())
        return grouped_matmul(x, weight, ends)

    monkeypatch.setattr("ultrazoo.nn.moe.grouped_matmul", spy)
    for seed in range(3):
        torch.manual_seed(seed)
        moe(torch.randn(1, 120, D, dtype=torch.float64))
    assert len(sizes) > 1 and all(size % ROW_TILE == 0 for size in sizes)
