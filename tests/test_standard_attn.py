"""Softmax attention against its formula, and against BERT's size."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from ultrazoo.blocks.standard_attn import StandardAttention, StandardAttnConfig
from ultrazoo.nn.rotary import rotate
from ultrazoo.nn.segments import positions

SEGMENTS = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0, 0], [5, 5, 5, 5, 5, 5, 3, 3, 3]])


def build(**options: object) -> StandardAttention:
    torch.manual_seed(0)
    block = StandardAttention(StandardAttnConfig.model_validate({"hidden_size": 12, "num_heads": 3} | options))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return block.double().eval()


def by_formula(block: StandardAttention, x: Tensor, segments: Tensor, rotary: bool) -> Tensor:
    """Token by token, head by head."""
    q, k, v = block.projections.qkv(x).unflatten(2, (3, 3, 4)).unbind(2)  # (B, L, H, K)
    if rotary:
        where = positions(segments, x.shape[1])
        q, k = rotate(q, where), rotate(k, where)
    y = torch.zeros_like(x)
    for b, t in segments.nonzero().tolist():
        seen = segments[b].eq(segments[b, t])
        heads = [torch.softmax(k[b, seen, h] @ q[b, t, h] / 2, 0) @ v[b, seen, h] for h in range(3)]
        y[b, t] = block.projections.output(torch.cat(heads))
    return y


@pytest.mark.parametrize("position_embedding", ["rope", "none", "learned"])
def test_output_is_the_formula(position_embedding: str) -> None:
    block, x = build(position_embedding=position_embedding), torch.randn(2, 9, 12).double()
    expected = by_formula(block, x, SEGMENTS, rotary=position_embedding == "rope")
    assert torch.allclose(block(x, SEGMENTS), expected, rtol=0, atol=1e-12)
    full = torch.ones_like(SEGMENTS)
    expected = by_formula(block, x, full, rotary=position_embedding == "rope")
    assert torch.allclose(block(x), expected, rtol=0, atol=1e-12)


def test_without_rotary_positions_it_is_a_set_and_with_them_a_sequence() -> None:
    x, order = torch.randn(1, 9, 12).double(), torch.randperm(9)
    blind, seeing = build(position_embedding="none"), build()
    assert torch.allclose(blind(x[:, order]), blind(x)[:, order], rtol=0, atol=1e-12)
    assert not torch.allclose(seeing(x[:, order]), seeing(x)[:, order], rtol=0, atol=1e-3)


def test_size_of_bert_base_and_of_an_unbiased_block() -> None:
    config = StandardAttnConfig(hidden_size=768, num_heads=12)
    with torch.device("meta"):
        biased = StandardAttention(config)
        unbiased = StandardAttention(config.model_copy(update={"attention_bias": False}))
    # HF's BertSelfAttention and BertSelfOutput.dense
    assert sum(p.numel() for p in biased.parameters()) == 4 * (768 * 768 + 768) == 2_362_368
    assert sum(p.numel() for p in unbiased.parameters()) == 4 * 768 * 768


def test_initial_projections_have_the_range_of_the_config() -> None:
    block = StandardAttention(StandardAttnConfig(hidden_size=128, num_heads=2, initializer_range=0.05))
    assert block.projections.qkv.weight.std().item() == pytest.approx(0.05, rel=0.05)
    assert not block.projections.qkv.bias.any()


def test_dropout_acts_on_weights_in_training_only() -> None:
    block = build(dropout=0.5)
    x = torch.randn(1, 9, 12).double()
    assert torch.equal(block(x), block(x))
    assert torch.equal(block(x), build()(x))
    block, x = block.float().train(), x.float()
    assert not torch.allclose(block(x), block(x))
    values = torch.stack([block(x) for _ in range(2000)])
    block.eval()
    error = (values.mean(0) - block(x)).abs().max() / block(x).abs().max()
    assert error < 0.15  # the mean over masks is the output without dropout


@pytest.mark.parametrize("documents", [False, True])
def test_no_matrix_over_pairs_of_tokens_is_kept_for_the_backward_pass(documents: bool) -> None:
    block, length = build(dropout=0.1).float().train(), 128
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    segments = torch.ones(1, length, dtype=torch.int64) if documents else None
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        block(torch.randn(1, length, 12), segments)
    assert 128 * 12 <= max(kept) < length * length


def test_bitnet_makes_both_projections_ternary() -> None:
    block = build(use_bitnet=True)
    assert [type(layer).__name__ for layer in (block.projections.qkv, block.projections.output)] == ["BitLinear"] * 2
    x = torch.randn(2, 9, 12).double().requires_grad_()
    block(x, SEGMENTS).sum().backward()
    assert x.grad is not None
    assert x.grad[SEGMENTS.ne(0)].any()
    assert not x.grad[SEGMENTS.eq(0)].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 10, "num_heads": 3}, "got hidden_size 10 and num_heads 3"),
        ({"hidden_size": 9, "num_heads": 3}, "3 channels a head, expected an even number"),
        ({"hidden_size": 8, "num_heads": 2, "dropout": 1.0}, "dropout"),
        ({"hidden_size": 8, "num_heads": 2, "qkv_bias": True}, "qkv_bias"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        StandardAttnConfig.model_validate(options)
