"""HoPE: the tiled product form against the formula with cosh and signed sinh, and the properties that it promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ultrazoo.nn.hope import TILE, frequencies, hope_attention, hope_scores


def naive_scores(q: Tensor, k: Tensor, theta: Tensor, damping: float, offset: int = 0) -> Tensor:
    """The formula, pair by pair, with queries ``offset`` positions after the keys; overflows from r of about 700 on."""
    q, k, theta = q.double(), k.double(), theta.double()
    m = torch.arange(q.shape[-2]).unsqueeze(1) + offset
    n = torch.arange(k.shape[-2])
    signed = (m - n).unsqueeze(-1).double()  # (Lq, Lk, 1)
    r = signed.abs()
    decay = torch.exp(-r * (theta + damping))
    c, s = decay * torch.cosh(r * theta), signed.sign() * decay * torch.sinh(r * theta)
    qe, qo, ke, ko = q[..., 0::2], q[..., 1::2], k[..., 0::2], k[..., 1::2]
    straight = torch.einsum("...mj,...nj,mnj->...mn", qe, ke, c) + torch.einsum("...mj,...nj,mnj->...mn", qo, ko, c)
    return (
        straight + torch.einsum("...mj,...nj,mnj->...mn", qe, ko, s) + torch.einsum("...mj,...nj,mnj->...mn", qo, ke, s)
    )


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("length", [1, 7, TILE, TILE + 1, 3 * TILE + 5])
@pytest.mark.parametrize("damping", [0.0, 0.01, 3.0])
def test_scores_are_the_formula(length: int, damping: float) -> None:
    q, k = draw(2, 3, length, 6), draw(2, 3, length, 6) + 0.1
    theta = frequencies(6, 50.0, dtype=torch.float64)
    expected = naive_scores(q, k, theta, damping)
    assert torch.allclose(hope_scores(q, k, theta, damping), expected, rtol=0, atol=1e-12 * expected.abs().max().item())


def test_fp32_keeps_its_accuracy_across_tiles() -> None:
    q, k, theta = draw(1, 1, 200, 32), draw(1, 1, 200, 32) + 0.1, frequencies(32, 1e4, dtype=torch.float64)
    expected = naive_scores(q, k, theta, 0.01)
    got = hope_scores(q.float(), k.float(), theta, 0.01).double()
    plain = (q.float() @ k.float().transpose(-1, -2)).double() - q @ k.transpose(-1, -2)
    assert (got - expected).abs().max() <= 4 * plain.abs().max()


def test_scores_depend_on_distances_only() -> None:
    q, k, theta = draw(1, 1, 90, 8), draw(1, 1, 90, 8) * 0.5, frequencies(8, 100.0, dtype=torch.float64)
    scores = hope_scores(q, k, theta, 0.02)
    for shift in (1, 5, 33):
        moved = hope_scores(*(torch.cat((torch.randn(1, 1, shift, 8).double(), x), dim=2) for x in (q, k)), theta, 0.02)
        assert torch.allclose(moved[..., shift:, shift:], scores, rtol=0, atol=1e-12)


def test_both_directions_are_told_apart() -> None:
    """A pair (1, 1) of a query sees such keys before it (rate a), and hardly those after it (rate 2 th + a)."""
    q = torch.ones(1, 1, 9, 2, dtype=torch.float64)
    scores = hope_scores(q, q, torch.tensor([0.7]), 0.1)[0, 0, 4]
    r = torch.arange(5, dtype=torch.float64)
    assert torch.allclose(scores[:5].flip(0), 2 * torch.exp(-0.1 * r), rtol=1e-6)
    assert torch.allclose(scores[4:], 2 * torch.exp(-1.5 * r), rtol=1e-6)


def test_without_frequency_it_is_a_pure_decay_and_without_damping_nothing() -> None:
    q, k, zero = draw(1, 2, 70, 4), draw(1, 2, 70, 4) - 0.3, torch.zeros(2)
    plain = q @ k.transpose(-1, -2)
    distance = (torch.arange(70).unsqueeze(1) - torch.arange(70)).abs().double()
    assert torch.allclose(hope_scores(q, k, zero, 0.05), plain * torch.exp(-0.05 * distance), rtol=0, atol=1e-12)
    assert torch.allclose(hope_scores(q, k, zero, 0.0), plain, rtol=0, atol=1e-12)


def test_the_cosine_part_decays_monotonically_from_one() -> None:
    """With q = k = (1, 0) in one pair the score is c alone."""
    q = torch.zeros(1, 1, 400, 2, dtype=torch.float64)
    q[..., 0] = 1
    for theta in (1.0, 0.1, 1e-3):
        c = hope_scores(q, q, torch.tensor([theta], dtype=torch.float64), 0.01)[0, 0, 0]
        assert c[0] == pytest.approx(1)
        assert (c.diff() < 0).all()
        assert (c > 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_finite_and_bounded_at_great_distances(dtype: torch.dtype) -> None:
    q, k = (100 * draw(1, 1, 1500, 4, dtype=torch.float32)).to(dtype).requires_grad_(), draw(1, 1, 1500, 4, dtype=dtype)
    theta = frequencies(4, 1e4)
    scores = hope_scores(q, k, theta, 0.0)
    bound = torch.linalg.vector_norm(q.float(), dim=-1).unsqueeze(-1) * torch.linalg.vector_norm(
        k.float(), dim=-1
    ).unsqueeze(-2)
    assert (scores.float().abs() <= bound * 1.02).all()
    scores.float().mean().backward()
    assert q.grad is not None
    assert q.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_does_not_reach_the_rescaled_products(dtype: torch.dtype) -> None:
    q, k, v = (draw(1, 1, 100, 8, dtype=torch.float32) + i for i in range(3))
    theta = frequencies(8, 1e4)
    expected = hope_attention(q, k, v, theta, 0.01)
    with torch.autocast("cpu", dtype):
        assert torch.equal(hope_attention(q, k, v, theta, 0.01), expected)


def test_attention_is_softmax_of_the_scores() -> None:
    q, k, v = (draw(2, 2, 75, 6) + i for i in range(3))
    theta = frequencies(6, 1e4, dtype=torch.float64)
    documents = torch.tensor([[1] * 40 + [2] * 35, [1] * 3 + [2] * 60 + [0] * 12])
    mask = documents[:, None, :, None].eq(documents[:, None, None, :])
    free_k, free_v = draw(1, 2, 3, 6), draw(1, 2, 3, 6) * 2
    scores = naive_scores(q, k, theta, 0.01).masked_fill(~mask, -torch.inf)
    every = torch.cat((q @ free_k.transpose(-1, -2), scores), dim=-1)
    expected = torch.softmax(every * 6**-0.5, dim=-1) @ torch.cat((free_v.expand(2, -1, -1, -1), v), dim=2)
    got = hope_attention(q, k, v, theta, 0.01, mask=mask, prefix=(free_k, free_v))
    assert torch.allclose(got, expected, rtol=0, atol=1e-12)


def test_gradients_across_a_tile_border() -> None:
    q, k, v = (draw(1, 1, TILE + 3, 2).requires_grad_() for _ in range(3))
    theta = frequencies(2, 1e4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda q, k, v: hope_attention(q, k, v, theta, 0.01), (q, k, v), fast_mode=True)


def test_an_odd_width_is_refused() -> None:
    with pytest.raises(ValueError, match="got key width 5"):
        frequencies(5, 1e4)
    with pytest.raises(ValueError, match=r"got base 0\.5"):
        frequencies(4, 0.5)
