"""What a block may say of the layer around it: no residual, no feed-forward, embeddings of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import Field
from torch import nn

from ultrazoo.config import ModelConfig, json_schema, load_config
from ultrazoo.errors import ConfigError
from ultrazoo.model import MaskedLM, build_model, parameter_table
from ultrazoo.nn.block_config import BlockConfig
from ultrazoo.plugins import Plugin
from ultrazoo.registry import Registry, registry
from ultrazoo.spec import BlockSpec

SMALL = {"vocab_size": 60, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "ffn_hidden_size": 48, "dropout": 0.0}


class HalfConfig(BlockConfig):
    vocab_size: int
    hidden_size: int
    factor: float = Field(0.5, description="Factor on the table.")


class Half(nn.Module):
    """x_t = factor e_t, and a bias."""

    def __init__(self, config: HalfConfig) -> None:
        super().__init__()
        self.factor = config.factor
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.offset = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, input_ids, segments=None):
        x = self.factor * self.tokens(input_ids) + self.offset
        return x if segments is None else x.masked_fill(segments.eq(0).unsqueeze(2), 0)


@pytest.fixture
def zoo(monkeypatch):
    """The built-in blocks, an attention without residual, and embeddings that halve."""
    attention = replace(registry().block("mixer", "standard_attn"), name="bare", residual=False)
    half = BlockSpec(name="half", kind="embedding", module=Half, config=HalfConfig, paper="none", equation="x = e / 2")
    extra = Plugin(name="extra", distribution="zoo-extra", version="1", module="extra", blocks=(attention, half))
    zoo = Registry([*registry().plugins, extra])
    for module in ("ultrazoo.model", "ultrazoo.config.model", "ultrazoo.config.schema"):
        monkeypatch.setattr(f"{module}.registry", lambda: zoo)
    return zoo


def build(**fields: object) -> MaskedLM:
    torch.manual_seed(0)
    return build_model(ModelConfig.model_validate({**SMALL, **fields})).eval()


def test_without_feed_forward_a_layer_is_its_mixer():
    for position in ("pre", "post"):
        model = build(ffn_type="none", norm_position=position)
        ids = torch.arange(5, 15).reshape(1, 10)
        x = model.embeddings(ids)
        for layer in model.layers:
            pre = position == "pre"
            x = x + layer.mixer(layer.mixer_norm(x)) if pre else layer.mixer_norm(x + layer.mixer(x))
        x = model.final_norm(x) if position == "pre" else x
        torch.testing.assert_close(model.encode(ids), x)
        assert not [part for part, _ in parameter_table(model) if part.startswith("ffn")]
        assert dict(parameter_table(model))["layer norms"] == 2 * 2 * 32
        assert model(ids, None, ids).loss_sum.isfinite()


def test_a_feed_forward_of_none_reads_no_width_and_takes_no_mixture(tmp_path):
    path = tmp_path / "none.yaml"
    path.write_text("model: {ffn_type: none, ffn_hidden_size: 64}\n")
    assert "model.ffn_hidden_size: has no effect without one of: mlp, moe" in load_config(path).notices
    with pytest.raises(ValueError, match=r"model\.ffn_type: got 'none' with use_moe true"):
        ModelConfig.model_validate({**SMALL, "ffn_type": "none", "use_moe": True})
    assert "none" in json_schema()["definitions"]["ModelConfig"]["properties"]["ffn_type"]["enum"]


def test_a_mixer_without_residual_replaces_its_input(zoo):
    model = build(layer_pattern=["bare"], ffn_type="none", dropout=0.5).train()
    for layer in model.layers:
        layer.mixer.dropout = 0.0
    x = torch.randn(1, 6, 32)
    for layer in model.layers:
        assert torch.equal(layer(x)[0], layer.mixer(layer.mixer_norm(x)))  # without dropout, too
    assert model.final_norm is None
    assert build(layer_pattern=["bare"]).final_norm is not None
    assert build(layer_pattern=["bare", "standard_attn"], ffn_type="none").final_norm is not None
    post = build(layer_pattern=["bare"], ffn_type="none", norm_position="post")
    layer = post.layers[0]
    assert torch.equal(layer(x)[0], layer.mixer_norm(layer.mixer(x)))


def test_embeddings_of_a_plugin_take_the_place_of_the_built_in(zoo):
    model = build(embedding_type="half", block_options={"half": {"factor": 0.25}})
    ids = torch.arange(5, 15).reshape(1, 10)
    torch.testing.assert_close(model.embeddings(ids), 0.25 * model.embeddings.tokens(ids) + 1)
    parts = dict(parameter_table(model))
    assert (parts["token embeddings"], parts["other embeddings"]) == (60 * 32, 32)
    assert list(parts).index("other embeddings") < list(parts).index("layer norms")
    output = model(ids, None, ids)
    output.loss_sum.backward()
    assert model.embeddings.tokens.weight.grad.abs().sum() > 0  # the tied head reads the plugin's table
    field = json_schema()["definitions"]["ModelConfig"]["properties"]["embedding_type"]
    assert field["enum"] == ["half", None]


def test_a_switch_that_the_embeddings_do_not_read_is_a_notice(zoo):
    on = {"embedding_type": "half", "use_embedding_conv": True, "use_factorized_embedding": True}
    config = ModelConfig.model_validate({**SMALL, "factorized_embedding_dim": 8, **on})
    notice = "model.use_embedding_conv: has no effect: embedding_type 'half' does not read it"
    assert notice in config.notices()
    assert "conv" not in "".join(build_model(config).state_dict())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"embedding_type": "hlf"}, r"model\.embedding_type: unknown name 'hlf'; did you mean 'half'"),
        ({"embedding_type": "half", "block_options": {"half": {"fctor": 1}}}, r"half\.fctor: unknown field"),
    ],
)
def test_wrong_embeddings_are_told_by_their_path(zoo, fields, message):
    with pytest.raises((ValueError, ConfigError), match=message):
        ModelConfig.model_validate({**SMALL, "factorized_embedding_dim": 8, **fields})
