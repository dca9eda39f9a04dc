"""The plugin as ultrazoo sees it: its presets, their sizes, and a model that learns."""

from __future__ import annotations

import pytest
import torch

from ultrazoo.config import ModelConfig, load_config
from ultrazoo.model import build_model, parameter_table
from ultrazoo.registry import registry


def per_layer(width: int, inner: int, state: int, heads: int, taps: int) -> int:
    projections = width * (2 * inner + 4 * state + 2 * heads) + inner * heads + inner * width
    return projections + (inner + 4 * state) * (taps + 1) + 3 * heads + inner


def test_the_published_encoder():
    loaded = load_config("hydra")
    assert loaded.notices == []
    with torch.device("meta"):
        model = build_model(loaded.config.model)
    parts = dict(parameter_table(model))
    assert parts["mixer hydra (x 23)"] == 23 * per_layer(768, 1536, 64, 24, 7) == 87_980_152
    assert not any(part.startswith("ffn") for part in parts)
    assert parts["layer norms"] == 23 * 2 * 768
    assert sum(parts.values()) == 112_085_176


def test_hydra_mixes_with_built_in_blocks_and_takes_options():
    fields = {"hidden_size": 32, "num_heads": 4, "num_layers": 2, "vocab_size": 64, "ffn_hidden_size": 48}
    config = ModelConfig.model_validate(
        {**fields, "layer_pattern": ["hydra", "standard_attn"], "block_options": {"hydra": {"d_state": 4}}}
    )
    model = build_model(config).eval()
    assert model.layers[0].mixer.state == 4
    ids = torch.arange(5, 25).reshape(2, 10)
    segments = torch.tensor([[1] * 4 + [2] * 6, [1] * 8 + [0, 0]])
    hidden = model.encode(ids, segments)
    torch.testing.assert_close(hidden[:1, 4:], model.encode(ids[:1, 4:]), rtol=1e-4, atol=1e-5)
    assert hidden[1, 8:].eq(0).all()


def test_a_wrong_option_is_told_by_its_path():
    with pytest.raises(ValueError, match=r"model\.block_options\.hydra\.d_stat: unknown field; did you mean 'd_state'"):
        ModelConfig.model_validate({"layer_pattern": ["hydra"], "block_options": {"hydra": {"d_stat": 4}}})


def test_the_mini_preset_learns():
    loaded = load_config("hydra_mini", ["model.vocab_size=32", "model.num_layers=2", "model.hidden_size=64"])
    torch.manual_seed(0)
    model = build_model(loaded.config.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    draw = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(80):  # numbers that count up: a masked one follows from a neighbour on either side
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
    assert losses[-1] < 0.5


def test_the_plugin_is_whole():
    plugin = next(plugin for plugin in registry().plugins if plugin.name == "hydra")
    assert [block.name for block in plugin.blocks] == ["hydra"]
    assert {preset.name for preset in plugin.presets} == {"hydra", "hydra_mini"}
    assert plugin.error is None
