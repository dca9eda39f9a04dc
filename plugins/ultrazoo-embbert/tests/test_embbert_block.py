"""The block by its equation, and the laws of the mixer contract."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F
from ultrazoo_embbert.block import SPEC, EmbBERT, EmbBERTConfig

from ultrazoo.testing.laws import LAWS

WIDTH = 6


def build(**options: float) -> EmbBERT:
    torch.manual_seed(0)
    return EmbBERT(EmbBERTConfig(hidden_size=WIDTH, **options)).double()


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randn(rows, length, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def equation(block: EmbBERT, x: torch.Tensor) -> torch.Tensor:
    """The layer on one document, (L, D) -> (L, D), with the convolution as a sum over what came before."""
    weights = torch.softmax((x @ block.query.weight.T + block.query.bias) @ x.T / math.sqrt(WIDTH), dim=1)
    attended = (weights @ x) @ block.output.weight.T + block.output.bias
    kernel = block.conv.weight.shape[2]
    channel = torch.arange(block.conv.weight.shape[0]) // (block.conv.weight.shape[0] // WIDTH)  # that each one reads
    rows = []
    for t in range(len(x)):
        total = block.conv.bias.clone()
        for back in range(min(kernel, t + 1)):
            total = total + block.conv.weight[:, 0, kernel - 1 - back] * x[t - back, channel]
        rows.append(total)
    convolved = F.silu(torch.stack(rows)) @ block.contract.weight.T + block.contract.bias
    first, second = (torch.exp(pair[0] @ pair[1]) for pair in (block.attention_scale, block.conv_scale))
    return first * attended - second * convolved


@pytest.mark.parametrize("options", [{}, {"kernel": 3}, {"kernel": 4, "expand": 2}])
def test_the_block_is_its_equation(options):
    block, x = build(**options), tokens(2, 40)
    expected = torch.stack([equation(block, row) for row in x])
    torch.testing.assert_close(block(x), expected, rtol=1e-11, atol=1e-12)


def test_the_convolution_reads_only_back_and_the_attention_both_ways():
    block, x = build(kernel=3), tokens(1, 12)
    moved = x.clone()
    moved[0, 8] += 1.0
    with torch.no_grad():
        block.contract.weight.zero_()
        changed = (block(moved) - block(x)).abs().amax(2)[0]
        assert (changed > 0).all()
        block.contract.weight.normal_()
        block.output.weight.zero_()
        changed = (block(moved) - block(x)).abs().amax(2)[0]
    assert changed.gt(0).nonzero().flatten().tolist() == [8, 9, 10]


@pytest.mark.parametrize("law", LAWS)
def test_laws(law):
    assert LAWS[law](SPEC).passed


def test_dropout_is_of_attention_weights_and_only_in_training():
    block, x = build(dropout=0.5), tokens(1, 20)
    assert torch.equal(block.eval()(x), build().eval()(x))
    with torch.no_grad():
        block.output.weight.zero_()  # the other branch has none
        assert torch.equal(block.train()(x), block.eval()(x))
        block.output.weight.normal_()
        assert not torch.equal(block.train()(x), block.eval()(x))


def test_parameters_and_initial_scales():
    torch.manual_seed(0)
    block = EmbBERT(EmbBERTConfig(hidden_size=128))
    assert sum(p.numel() for p in block.parameters()) == 3 * (128**2 + 128) + 128 * 33 + 4 * 128 == 54_272
    assert block.attention_scale.std().item() == pytest.approx(0.1, rel=0.15)
    assert all(0.8 < value < 1.25 for value in block.statistics().values())


def test_options_are_checked():
    with pytest.raises(ValidationError, match="kernel"):
        EmbBERTConfig(hidden_size=8, kernel=0)
    with pytest.raises(ValidationError, match="kernle"):
        EmbBERTConfig(hidden_size=8, kernle=3)
