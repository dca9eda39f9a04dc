"""The published encoder: its size to the parameter and to the byte, its numbers, and that it learns."""

from __future__ import annotations

import pytest
import torch
from ultrazoo_embbert.footprint import encoder_parameters, inference_bytes

from ultrazoo.config import ModelConfig, load_config
from ultrazoo.errors import ConfigError
from ultrazoo.model import MaskedLM, build_model
from ultrazoo.registry import registry

SEPARATOR = 3


def build(*overrides: str) -> MaskedLM:
    torch.manual_seed(0)
    return build_model(load_config("embbert_exact", overrides).config.model)


@pytest.fixture(scope="module")
def published() -> MaskedLM:
    return build().eval()


def test_the_preset_is_the_published_encoder_to_the_parameter_and_the_byte(published):
    assert load_config("embbert_exact").notices == []
    embeddings = sum(p.numel() for p in published.embeddings.parameters())
    assert embeddings == 8192 * 16 + 16 * 128 + 256 * 16 + 16 * 128 + 3 * 128 == 139_648
    assert [sum(p.numel() for p in layer.parameters()) for layer in published.layers] == [54_400] * 4
    assert encoder_parameters(published) == 357_248
    assert inference_bytes(357_248, hidden_size=128, length=256) == 1_953_280


def test_there_is_no_residual_no_feed_forward_and_no_last_norm(published):
    layer, x = published.layers[0], torch.randn(2, 9, 128)
    y, aux = layer(x)
    assert torch.equal(y, layer.mixer(layer.mixer_norm(x))) and aux == {}
    assert layer.ffn is None and layer.ffn_norm is None and published.final_norm is None


def by_the_equations(model: MaskedLM, ids: torch.Tensor) -> torch.Tensor:
    """The encoder on one sequence, (L,) -> (L, D): embeddings, then four times a norm and a layer."""
    table = model.embeddings
    second = torch.cumsum(ids == SEPARATOR, 0) > 0
    x = table.tokens.weight[ids] @ table.projection.weight.T
    x = x + table.positions.weight[: len(ids)] @ table.position_projection.weight.T
    x = x + table.sentences.weight[1 + second.long()]
    for layer in model.layers:
        x = x / torch.sqrt(x.square().mean(1, keepdim=True) + torch.finfo(torch.float32).eps) * layer.mixer_norm.weight
        block = layer.mixer
        weights = torch.softmax((x @ block.query.weight.T + block.query.bias) @ x.T / 128**0.5, dim=1)
        attended = weights @ x @ block.output.weight.T + block.output.bias
        past = torch.cat((x.new_zeros(31, 128), x)).unfold(0, 32, 1)  # (L, D, 32)
        convolved = (past * block.conv.weight[:, 0]).sum(2) + block.conv.bias
        convolved = convolved * torch.sigmoid(convolved) @ block.contract.weight.T + block.contract.bias
        x = block.attention_scale.prod(0).sum().exp() * attended - block.conv_scale.prod(0).sum().exp() * convolved
    return x


def test_the_encoder_is_its_equations_also_packed():
    model = build().double().eval()
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(5, 8192, (2, 90), generator=draw)
    ids[:, [20, 39, 70]] = SEPARATOR
    torch.testing.assert_close(model.encode(ids[:1])[0], by_the_equations(model, ids[0]), rtol=1e-10, atol=1e-12)
    segments = torch.tensor([[1] * 40 + [2] * 50, [4] * 71 + [0] * 19])
    hidden = model.encode(ids, segments)
    for row, start, stop in ((0, 0, 40), (0, 40, 90), (1, 0, 71)):
        expected = by_the_equations(model, ids[row, start:stop])
        torch.testing.assert_close(hidden[row, start:stop], expected, rtol=1e-10, atol=1e-12)
    assert hidden[1, 71:].eq(0).all()


def test_nothing_but_attention_weights_is_dropped():
    model = build("model.dropout=0.5").train()
    for layer in model.layers:
        layer.mixer.dropout = 0.0
    ids = torch.arange(5, 45).reshape(1, 40)
    assert torch.equal(model.encode(ids), model.encode(ids))
    model.layers[0].mixer.dropout = 0.5
    assert not torch.equal(model.encode(ids), model.encode(ids))


def test_a_row_longer_than_the_table_of_positions_is_refused(published):
    with pytest.raises(ValueError, match="got a row of 300 tokens, expected at most 256"):
        published.encode(torch.full((1, 300), 7))
    with pytest.raises(ConfigError, match=r"training\.max_length: got 300, expected at most"):
        build("training.max_length=300")


def test_what_the_embeddings_cannot_do_is_refused():
    with pytest.raises(ConfigError, match="got position_embedding 'sinusoidal', expected learned"):
        build("model.position_embedding=sinusoidal")
    idle = load_config("embbert_exact", ["model.use_embedding_conv=true"])
    assert [line for line in idle.notices if line.startswith("model.use_embedding_conv: has no effect")]
    assert build("model.position_embedding=none").embeddings.positions is None


def test_the_block_stands_beside_built_in_ones():
    fields = {"hidden_size": 32, "num_heads": 4, "num_layers": 2, "vocab_size": 64, "ffn_hidden_size": 48}
    model = build_model(ModelConfig.model_validate({**fields, "layer_pattern": ["standard_attn", "embbert"]})).eval()
    x = torch.randn(1, 7, 32)
    layer = model.layers[1]
    y = layer.mixer(layer.mixer_norm(x))
    torch.testing.assert_close(layer(x)[0], y + layer.ffn(layer.ffn_norm(y))[0])
    assert model.final_norm is not None  # the feed-forward has its residual


def test_it_learns():
    model = build("model.vocab_size=32", "model.num_layers=2", "model.hidden_size=64", "model.dropout=0.0")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    draw = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(150):  # numbers that count up: a masked one follows from the one before it
        ids = 5 + (torch.randint(27, (16, 1), generator=draw) + torch.arange(24)) % 27
        masked = torch.rand(ids.shape, generator=draw) < 0.2
        output = model(ids.masked_fill(masked, 4), None, ids.masked_fill(~masked, -100))
        loss = output.loss_sum / output.num_targets
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 3.0
    assert losses[-1] < 1.0


def test_the_plugin_is_whole():
    plugin = next(plugin for plugin in registry().plugins if plugin.name == "embbert")
    assert {(block.kind, block.name) for block in plugin.blocks} == {
        ("mixer", "embbert"),
        ("embedding", "embbert_embedding"),
    }
    assert [preset.name for preset in plugin.presets] == ["embbert_exact"]
    assert plugin.error is None
