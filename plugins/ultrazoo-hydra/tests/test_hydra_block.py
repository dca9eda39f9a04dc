"""The mixer against its matrices, and against what the paper says of them."""

from __future__ import annotations

import pytest
import torch
from hydra_matrix import hydra_by_matrices, matrices
from pydantic import ValidationError
from ultrazoo_hydra.block import SPEC, Hydra, HydraConfig

from ultrazoo.testing.laws import LAWS

SMALL = {"hidden_size": 8, "headdim": 4, "d_state": 3, "d_conv": 5}


def build(**options: int) -> Hydra:
    torch.manual_seed(0)
    block = Hydra(HydraConfig(**{**SMALL, **options})).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return block


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randn(
        rows, length, SMALL["hidden_size"], dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


def test_the_scans_are_the_matrices():
    block, x = build(), tokens(2, 13)
    expected = torch.stack([hydra_by_matrices(block, row) for row in x])
    torch.testing.assert_close(block(x), expected, rtol=1e-11, atol=1e-12)


def test_each_document_has_matrices_of_its_own():
    block, x = build(), tokens(2, 14)
    segments = torch.tensor([[3] * 5 + [1] + [2] * 6 + [0, 0], [0] + [1] * 4 + [0] + [2] * 8])
    y = block(torch.where(segments.eq(0).unsqueeze(2), 1e3, x), segments)
    for row in range(2):
        for document in segments[row].unique().tolist():
            here = segments[row].eq(document)
            expected = torch.zeros_like(x[row, here]) if document == 0 else hydra_by_matrices(block, x[row, here])
            torch.testing.assert_close(y[row, here], expected, rtol=1e-11, atol=1e-12)


def test_gradients_are_those_of_the_matrices():
    block, x = build(), tokens(1, 9).requires_grad_()
    values = {"x": x, **dict(block.named_parameters())}
    got = torch.autograd.grad(block(x).square().sum(), list(values.values()))
    expected = torch.autograd.grad(hydra_by_matrices(block, x[0]).square().sum(), list(values.values()))
    for name, one, other in zip(values, got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_the_matrices_are_quasiseparable():
    M, _, _ = matrices(build(), tokens(1, 12)[0])
    for cut in range(1, 12):
        for part in (M[:, cut:, :cut], M[:, :cut, cut:]):  # each side of the diagonal
            ranks = torch.linalg.matrix_rank(part.detach(), rtol=1e-10)
            assert ranks.max() <= SMALL["d_state"]
            if min(part.shape[1:]) > SMALL["d_state"]:
                assert ranks.min() == SMALL["d_state"]
    assert torch.linalg.matrix_rank(M.detach(), rtol=1e-10).min() == 12


def test_a_token_weighs_itself_by_the_diagonal_alone():
    block, x = build(), tokens(1, 1)
    with torch.no_grad():
        before = block(x)
        block.state_proj.weight.normal_()
        torch.testing.assert_close(block(x), before)  # neither B and C nor delta act on a document of one token
        block.D.add_(1.0)
        assert not torch.allclose(block(x), before)


def test_reading_backwards_is_swapping_the_directions():
    block, other, x = build(), build(), tokens(2, 11)
    state, heads = SMALL["d_state"], block.A_log.numel()
    order = torch.cat([torch.arange(2 * state, 4 * state), torch.arange(2 * state)])
    inner = torch.arange(block.diagonal.in_features)
    deltas = 4 * state + torch.cat([torch.arange(heads, 2 * heads), torch.arange(heads)])
    with torch.no_grad():
        other.state_proj.weight.copy_(block.state_proj.weight[torch.cat([order, deltas])])
        swapped = torch.cat([inner, len(inner) + order])
        other.conv.weight.copy_(block.conv.weight[swapped].flip(2))
        other.conv.bias.copy_(block.conv.bias[swapped])
    torch.testing.assert_close(other(x.flip(1)).flip(1), block(x))
    assert not torch.allclose(block(x.flip(1)).flip(1), block(x))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("options", [{}, {"headdim": 8, "d_state": 5, "d_conv": 4}], ids=["defaults", "two heads"])
def test_laws(law, options):
    if law == "compile" and options:
        pytest.skip("the graph is the same")
    assert LAWS[law](SPEC, options).passed


def test_bitnet_leaves_what_steers_the_scans_alone():
    block = Hydra(HydraConfig(hidden_size=16, headdim=8, use_bitnet=True))
    names = {name for name, module in block.named_modules() if type(module).__name__ == "BitLinear"}
    assert names == {"in_proj", "out_proj"}
    assert LAWS["packing"](SPEC, {"headdim": 4, "use_bitnet": True}).passed


def test_initial_values():
    torch.manual_seed(0)
    block = Hydra(HydraConfig(hidden_size=512))
    delta = torch.nn.functional.softplus(block.dt_bias)
    assert delta.min() >= 1e-3 * 0.999 and delta.max() <= 1e-1 * 1.001 and len(delta) == 16
    assert block.A_log.eq(0).all() and block.D.eq(1).all()
    for layer in (block.in_proj, block.state_proj, block.diagonal, block.out_proj):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert set(block.statistics()) == {"step", "forget", "retained_tokens"}


def test_options_are_checked():
    assert HydraConfig(hidden_size=768).num_heads == 24
    assert HydraConfig(hidden_size=20).head_width == 10
    with pytest.raises(ValidationError, match=r"got headdim 7, expected a divisor of the inner width 16 .* nearest: 8"):
        HydraConfig(hidden_size=8, headdim=7)
    with pytest.raises(ValidationError, match="swap them"):
        HydraConfig(hidden_size=8, dt_min=0.2)
    with pytest.raises(ValidationError, match="n_state"):
        HydraConfig(hidden_size=8, n_state=2)
