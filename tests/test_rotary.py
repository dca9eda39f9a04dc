"""Rotary positions: scores depend on distances, lengths are kept, halves of precision are not lost."""

from __future__ import annotations

import math

import pytest
import torch

from ultrazoo.nn.rotary import rotate, rotate_pairs, turn_pairs


def test_turns_each_pair_by_position_times_frequency():
    x = torch.tensor([1.0, 0.0, 0.0, 2.0], dtype=torch.float64).reshape(1, 1, 1, 4)
    y = rotate(x, torch.tensor([[3]]), base=100.0).flatten()
    expected = [math.cos(3), math.sin(3), -2 * math.sin(0.3), 2 * math.cos(0.3)]
    torch.testing.assert_close(y, torch.tensor(expected, dtype=torch.float64))


def test_scores_depend_on_the_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 2, 8, dtype=torch.float64)

    def score(m, n):
        return (rotate(q, torch.tensor([[m]])) * rotate(k, torch.tensor([[n]]))).sum(-1)

    torch.testing.assert_close(score(3, 11), score(40, 48))
    assert not torch.allclose(score(3, 11), score(3, 12))
    torch.testing.assert_close(score(5, 5), (q * k).sum(-1))


def test_position_zero_changes_nothing_and_lengths_are_kept():
    x = torch.randn(2, 5, 3, 8)
    y = rotate(x, torch.arange(5).unsqueeze(0))
    assert torch.equal(y[:, 0], x[:, 0])
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))


def test_positions_of_each_row():
    x = torch.randn(2, 3, 1, 4)
    rows = torch.tensor([[0, 1, 0], [2, 5, 1]])
    apart = torch.cat([rotate(x[b : b + 1], rows[b : b + 1]) for b in range(2)])
    torch.testing.assert_close(rotate(x, rows), apart, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_far_positions_are_exact_in_low_precision(dtype):
    x = torch.randn(1, 4, 2, 8).to(dtype)
    far = torch.tensor([[4001, 5003, 7007, 8009]])
    y = rotate(x, far)
    assert y.dtype is dtype
    error = (y.double() - rotate(x.double(), far)).abs()
    assert (error <= 1e-3 + torch.finfo(dtype).eps * x.double().abs().max()).all()


def test_gradient_and_compile():
    x = torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    row = torch.tensor([[0, 1, 2]])
    assert torch.autograd.gradcheck(lambda x: rotate(x, row), (x,))
    compiled = torch.compile(rotate, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, row), rotate(x, row))


def test_odd_width_is_refused():
    with pytest.raises(ValueError, match="head width 5"):
        rotate_pairs(torch.randn(1, 2, 1, 5), torch.tensor([[0, 1]]), torch.ones(2))


def test_the_turn_is_an_operator_that_takes_any_strides():
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64).permute(0, 3, 2, 1).requires_grad_()
    angles = torch.randn(1, 5, 2, dtype=torch.float64)
    arguments = (x, angles.cos(), angles.sin())
    torch.library.opcheck(turn_pairs, arguments)
    assert torch.autograd.gradcheck(turn_pairs, arguments)
    even, odd = x[..., ::2], x[..., 1::2]
    cos, sin = angles.cos().unsqueeze(2), angles.sin().unsqueeze(2)
    expected = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)
    torch.testing.assert_close(turn_pairs(*arguments), expected)
