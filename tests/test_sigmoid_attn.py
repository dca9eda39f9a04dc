"""Sigmoid attention against its formula, the -log n bias, and the stabilisers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ultrazoo.blocks.sigmoid_attn import SigmoidAttention, SigmoidAttnConfig

SEGMENTS = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0, 0], [5, 5, 5, 5, 5, 5, 3, 3, 3]])


def build(**options: object) -> SigmoidAttention:
    torch.manual_seed(0)
    plain = {"hidden_size": 12, "num_heads": 3, "position_embedding": "none", "output_norm": False}
    block = SigmoidAttention(SigmoidAttnConfig.model_validate(plain | options))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return block.double().eval()


def by_formula(block: SigmoidAttention, x: Tensor, segments: Tensor, normalize: bool = False) -> Tensor:
    q, k, v = block.projections.qkv(x).unflatten(2, (3, 3, 4)).unbind(2)  # (B, L, H, K)
    y = torch.zeros_like(x)
    for b, t in segments.nonzero().tolist():
        seen = segments[b].eq(segments[b, t])
        heads = []
        for h in range(3):
            weights = 1 / (1 + torch.exp(-(k[b, seen, h] @ q[b, t, h] / 2 - math.log(seen.sum()))))
            heads.append((weights / weights.sum() if normalize else weights) @ v[b, seen, h])
        y[b, t] = block.projections.output(torch.cat(heads))
    return y


@pytest.mark.parametrize("normalize", [False, True])
def test_output_is_the_formula(normalize: bool) -> None:
    block, x = build(normalize=normalize), torch.randn(2, 9, 12).double()
    assert torch.allclose(block(x, SEGMENTS), by_formula(block, x, SEGMENTS, normalize), rtol=0, atol=1e-12)
    full = by_formula(block, x, torch.ones_like(SEGMENTS), normalize)
    assert torch.allclose(block(x), full, rtol=0, atol=1e-12)


def test_weights_are_not_normalised() -> None:
    """Doubling all scores' agreement grows the output; softmax's weights would still sum to 1."""
    block = build()
    q = torch.ones(1, 6, 1, 4).double()
    v = torch.ones(1, 6, 1, 4).double()
    sums = [block._attend(scale * q, q, v, None)[0, 0, 0, 0].item() for scale in (0.0, 1.0, 20.0)]
    assert sums[0] == pytest.approx(6 / (1 + 6))  # n sigmoid(-log n)
    assert sums[1] == pytest.approx(6 / (1 + 6 * math.exp(-2)))
    assert sums[2] == pytest.approx(6)


def test_the_size_at_the_start_hardly_depends_on_the_length() -> None:
    """-log n holds the sum of the weights near 1; without it the output would be n / 2 mean values."""
    block = SigmoidAttention(SigmoidAttnConfig(hidden_size=64, num_heads=4, output_norm=False)).eval()
    common = torch.randn(64)
    sizes = [block(common + 0.1 * torch.randn(1, n, 64)).std().item() for n in (16, 128, 1024)]
    assert max(sizes) < 1.2 * min(sizes)


def test_other_documents_and_padding_have_weight_exactly_zero() -> None:
    block, x = build(), torch.randn(2, 9, 12).double()
    wild = x.clone()
    wild[0, 3:] = 1e6
    assert torch.equal(block(wild, SEGMENTS)[0, :3], block(x, SEGMENTS)[0, :3])
    x.requires_grad_()
    block(x, SEGMENTS)[0, :3].sum().backward()
    assert x.grad is not None
    assert x.grad[0, :3].all()
    assert not x.grad[0, 3:].any()


def test_the_hybrid_norm_is_on_by_default_and_bounds_the_output() -> None:
    assert SigmoidAttnConfig(hidden_size=12, num_heads=3).output_norm
    block, x = build(output_norm=True), torch.randn(2, 9, 12).double()
    y = block(x)
    plain = build()(x)
    expected = plain * torch.rsqrt(plain.square().mean(-1, keepdim=True) + 1e-5) * block.norm.weight
    assert torch.allclose(y, expected, rtol=0, atol=1e-12)


def test_layer_scale_begins_at_its_value() -> None:
    torch.manual_seed(0)
    block = SigmoidAttention(SigmoidAttnConfig(hidden_size=12, num_heads=3, layer_scale=1e-4))
    torch.manual_seed(0)
    plain = SigmoidAttention(SigmoidAttnConfig(hidden_size=12, num_heads=3))
    x = torch.randn(2, 9, 12)
    assert torch.allclose(block(x, SEGMENTS), 1e-4 * plain(x, SEGMENTS), rtol=1e-5, atol=0)
    assert block.gain.requires_grad


def test_qk_norm_makes_scores_independent_of_the_size_of_q_and_k() -> None:
    block = build(qk_norm=True, position_embedding="rope", attention_bias=False)
    x = torch.randn(1, 9, 12).double()
    y = block(x)
    with torch.no_grad():
        block.projections.qkv.weight[:24] *= 7
    assert torch.allclose(block(x), y, rtol=0, atol=1e-3 * y.abs().max().item())
    with torch.no_grad():
        block.projections.qk_norms[0].weight *= 7
    assert not torch.allclose(block(x), y, rtol=0, atol=1e-3 * y.abs().max().item())


def test_dropout_acts_on_weights_in_training_only() -> None:
    block, x = build(dropout=0.5), torch.randn(1, 9, 12).double()
    assert torch.equal(block(x), build()(x))
    block.train()
    assert not torch.allclose(block(x), block(x))


@pytest.mark.parametrize(
    ("options", "extra"),
    [
        ({}, 768),
        ({"output_norm": False}, 0),
        ({"qk_norm": True, "layer_scale": 1e-4}, 768 + 768 + 2 * 64),
        ({"attention_bias": False}, 768 - 4 * 768),
    ],
)
def test_parameters_are_counted(options: dict[str, object], extra: int) -> None:
    with torch.device("meta"):
        block = SigmoidAttention(SigmoidAttnConfig.model_validate({"hidden_size": 768, "num_heads": 12} | options))
    assert sum(p.numel() for p in block.parameters()) == 4 * (768 * 768 + 768) + extra


def test_no_score_matrix_is_kept_for_the_backward_pass() -> None:
    block, length = build(), 64
    saved: list[int] = []
    x = torch.randn(1, length, 12).double().requires_grad_()

    def note(tensor: Tensor) -> Tensor:
        if tensor.numel() == 3 * length * length and tensor.is_floating_point():
            saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        block(x, torch.ones(1, length, dtype=torch.int64))
    assert not saved
