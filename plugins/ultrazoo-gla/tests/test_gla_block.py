"""The mixer against the paper's equations written out, and the plugin as ultrazoo sees it."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F
from ultrazoo_gla.block import GLA, SPEC, GLAConfig
from ultrazoo_gla.reference import gated_linear_attention_matrix

from ultrazoo.config import ModelConfig, load_config
from ultrazoo.model import build_model
from ultrazoo.nn.bitlinear import BitLinear
from ultrazoo.registry import registry
from ultrazoo.testing.laws import LAWS


def build(**options: object) -> GLA:
    torch.manual_seed(0)
    block = GLA(GLAConfig.model_validate({"hidden_size": 12, "num_heads": 3, "gate_rank": 4, **options})).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return block


def tokens(rows: int, length: int) -> Tensor:
    return torch.randn(rows, length, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_the_equations(block: GLA, x: Tensor) -> Tensor:
    """The mixer on one document, (L, D) -> (L, D), by its matrices."""
    q, k, v = ((x @ p.weight.T).unflatten(1, (block.heads, -1)) for p in (block.q_proj, block.k_proj, block.v_proj))
    z = x @ block.gate_down.weight.T @ block.gate_up.weight.T + block.gate_up.bias
    gates = (torch.sigmoid(z) ** (1 / block.temperature)).unflatten(1, (2, block.heads, -1))
    M = gated_linear_attention_matrix(q[None] / q.shape[2] ** 0.5, k[None], gates.log()[None])[0]
    o = torch.einsum("hnm,mhv->nhv", M, v)
    normed = o / (o.square().mean(2, keepdim=True) + block.norm_eps).sqrt() * block.norm_weight
    return (F.silu(x @ block.r_proj.weight.T + block.r_proj.bias) * normed.flatten(1)) @ block.out_proj.weight.T


@pytest.mark.parametrize("options", [{}, {"expand_k": 1.0, "expand_v": 2.0, "gate_temperature": 2.0}], ids=str)
def test_it_is_the_paper_written_out(options):
    block, x = build(**options), tokens(2, 19)
    expected = torch.stack([by_the_equations(block, row) for row in x])
    torch.testing.assert_close(block(x), expected, rtol=1e-11, atol=1e-12)


def test_each_document_is_apart():
    block, x = build(), tokens(2, 14)
    segments = torch.tensor([[3] * 5 + [1] + [2] * 6 + [0, 0], [0] + [1] * 4 + [0] + [2] * 8])
    y = block(torch.where(segments.eq(0).unsqueeze(2), 1e3, x), segments)
    for row in range(2):
        for document in segments[row].unique().tolist():
            here = segments[row].eq(document)
            expected = torch.zeros_like(x[row, here]) if document == 0 else by_the_equations(block, x[row, here])
            torch.testing.assert_close(y[row, here], expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", LAWS)
def test_it_keeps_the_laws_of_mixers(name):
    LAWS[name](SPEC)


def test_it_tells_its_left_from_its_right():
    block, x = build(), tokens(1, 3)
    assert not torch.allclose(block(x)[:, 1], block(x.flip(1))[:, 1], rtol=1e-3)


def test_bitnet_spares_the_gate():
    block = build(use_bitnet=True)
    quantised = {name for name, module in block.named_children() if isinstance(module, BitLinear)}
    assert quantised == {"q_proj", "k_proj", "v_proj", "r_proj", "out_proj"}


def test_sizes():
    config = GLAConfig(hidden_size=768, num_heads=4)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in GLA(config).parameters())
    assert parameters == 768 * (2 * 384 + 2 * 768) + 768 + 16 * 768 + 16 * 768 + 768 + 192 + 768 * 768
    assert SPEC.state_size is not None and SPEC.state_size(config) == 2 * 4 * 96 * 192


def test_widths_that_do_not_fit_say_so():
    with pytest.raises(ValidationError, match=r"got expand_k 0\.5 x hidden_size 12 = 6 with 4 num_heads"):
        GLAConfig(hidden_size=12, num_heads=4)
    with pytest.raises(ValueError, match=r"model\.block_options\.gla\.gate_rnk: unknown field"):
        ModelConfig.model_validate({"layer_pattern": ["gla"], "block_options": {"gla": {"gate_rnk": 4}}})


def test_the_plugin_is_whole():
    plugin = next(plugin for plugin in registry().plugins if plugin.name == "gla")
    assert plugin.error is None
    assert [block.name for block in plugin.blocks] == ["gla"]
    assert [op.name for op in plugin.ops] == ["gla::gated_linear_attention"]
    assert [preset.name for preset in plugin.presets] == ["gla"]


def test_it_mixes_with_built_in_blocks_and_takes_options_in_the_pattern():
    fields = {"hidden_size": 32, "num_heads": 4, "num_layers": 2, "vocab_size": 64, "ffn_hidden_size": 48}
    pattern = [{"block": "gla", "gate_rank": 3}, "standard_attn"]
    model = build_model(ModelConfig.model_validate({**fields, "layer_pattern": pattern})).eval()
    assert model.layers[0].mixer.gate_down.out_features == 3
    ids, segments = torch.arange(5, 25).reshape(2, 10), torch.tensor([[1] * 4 + [2] * 6, [1] * 8 + [0, 0]])
    hidden = model.encode(ids, segments)
    torch.testing.assert_close(hidden[:1, 4:], model.encode(ids[:1, 4:]), rtol=1e-4, atol=1e-5)
    assert hidden[1, 8:].eq(0).all()


def test_the_preset_learns():
    loaded = load_config("gla", ["model.vocab_size=32", "model.num_layers=2", "model.hidden_size=64"])
    assert loaded.notices == []
    torch.manual_seed(0)
    model = build_model(loaded.config.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    draw = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(200):  # numbers that count up: a masked one follows from a neighbour, if its side is known
        start = torch.randint(27, (16, 1), generator=draw)
        ids = 5 + (start + torch.arange(24)) % 27
        masked = torch.rand(ids.shape, generator=draw) < 0.2
        output = model(ids.masked_fill(masked, 4), None, ids.masked_fill(~masked, -100))
        loss = output.loss_sum / output.num_targets
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 3.0
    assert losses[-1] < 0.8
