"""The assembled encoder: what goes through which layer, in what order, and what comes out at padding and targets."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from ultrazoo.config import ModelConfig
from ultrazoo.errors import ConfigError
from ultrazoo.model import MaskedLM, build_model, parameter_table
from ultrazoo.nn.tiles import ROW_TILE

V = 60


def config(**fields: object) -> ModelConfig:
    small = {"vocab_size": V, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "ffn_hidden_size": 48, "dropout": 0.0}
    return ModelConfig.model_validate({**small, **fields})


def build(**fields: object) -> MaskedLM:
    torch.manual_seed(0)
    return build_model(config(**fields))


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.randint(5, V, (2, 12), generator=torch.Generator().manual_seed(1))
    segments = torch.tensor([[1] * 5 + [2] * 7, [1] * 8 + [0] * 4])
    labels = torch.full_like(ids, -100)
    labels[0, 3], labels[0, 9], labels[1, 0] = 7, 8, 9
    return ids, segments, labels


def test_pre_norm_by_hand():
    model = build(num_loops=2).eval()
    ids, segments, _ = batch()
    x = model.embeddings(ids, segments)
    for layer in [*model.layers, *model.layers]:
        x = x + layer.mixer(layer.mixer_norm(x), segments)
        x = x + layer.ffn(layer.ffn_norm(x), segments)[0]
    expected = model.final_norm(x).masked_fill(segments.eq(0).unsqueeze(2), 0)
    torch.testing.assert_close(model.encode(ids, segments), expected)


def test_post_norm_by_hand():
    model = build(norm_position="post").eval()
    ids, segments, _ = batch()
    x = model.embeddings(ids, segments)
    for layer in model.layers:
        x = layer.mixer_norm(x + layer.mixer(x, segments))
        x = layer.ffn_norm(x + layer.ffn(x, segments)[0])
    assert model.final_norm is None
    torch.testing.assert_close(model.encode(ids, segments), x.masked_fill(segments.eq(0).unsqueeze(2), 0))


def test_loops_share_their_weights_and_change_the_result():
    once, thrice = build(), build(num_loops=3)
    assert [p.shape for p in once.parameters()] == [p.shape for p in thrice.parameters()]
    thrice.load_state_dict(once.state_dict())
    ids, segments, _ = batch()
    assert not torch.allclose(once(ids, segments).hidden, thrice(ids, segments).hidden)


def test_the_pattern_is_repeated_over_the_layers():
    model = build(num_layers=5, layer_pattern=["standard_attn", "sigmoid_attn"])
    names = [layer.mixer_name for layer in model.layers]
    assert names == ["standard_attn", "sigmoid_attn", "standard_attn", "sigmoid_attn", "standard_attn"]
    assert dict(parameter_table(model))["ffn mlp (x 5)"] == 5 * (2 * 32 * 48 + 32 + 48)


@pytest.mark.parametrize("factorised", [True, False])
def test_the_loss_is_the_cross_entropy_of_the_targets_alone(factorised):
    model = build(use_factorized_embedding=factorised, factorized_embedding_dim=8)
    ids, segments, labels = batch()
    everywhere = model(ids, segments)
    trained = model(ids, segments, labels)
    assert everywhere.logits.shape == (2, 12, V)
    assert trained.logits.shape == (3, V) and trained.num_targets == 3
    torch.testing.assert_close(trained.logits, everywhere.logits[labels != -100])
    expected = F.cross_entropy(everywhere.logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(trained.loss_sum, expected)
    assert trained.loss_sum.item() / 3 == pytest.approx(math.log(V), rel=0.1)
    assert everywhere.loss_sum is None


def test_the_head_multiplies_whole_tiles_of_rows_however_many_targets_there_are():
    model = build()
    ids, segments, labels = batch()
    sizes = []
    model.head.register_forward_pre_hook(lambda head, arguments: sizes.append(arguments[0].shape[0]))
    for count in (0, 1, 3):
        chosen = torch.full_like(labels, -100).flatten()
        chosen[:count] = 7
        assert model(ids, segments, chosen.view_as(labels)).logits.shape[0] == count
    assert sizes == [0, ROW_TILE, ROW_TILE]


def test_no_target_gives_a_loss_of_zero_that_still_has_gradients():
    model = build()
    ids, segments, labels = batch()
    output = model(ids, segments, torch.full_like(labels, -100))
    assert output.num_targets == 0 and output.logits.shape == (0, V) and output.loss_sum == 0
    output.loss_sum.backward()
    assert model.embeddings.tokens.weight.grad is not None


def test_packed_documents_equal_documents_apart_and_padding_is_zero():
    model = build(layer_pattern=["standard_attn", "sigmoid_attn"], use_moe=True).eval()
    ids, segments, _ = batch()
    hidden = model.encode(ids, segments)
    torch.testing.assert_close(hidden[:1, :5], model.encode(ids[:1, :5]))
    torch.testing.assert_close(hidden[:1, 5:], model.encode(ids[:1, 5:]))
    torch.testing.assert_close(hidden[1:, :8], model.encode(ids[1:, :8]))
    assert hidden[1, 8:].eq(0).all()
    assert torch.equal(model(ids, segments).hidden, hidden)


def test_auxiliary_losses_are_means_over_layers_and_loops():
    model = build(use_moe=True, num_loops=2, num_experts=3, top_k_experts=1)
    seen = []
    for layer in model.layers:
        layer.ffn.register_forward_hook(lambda module, inputs, output: seen.append(output[1]))
    ids, segments, labels = batch()
    output = model(ids, segments, labels)
    assert len(seen) == 4 and set(output.losses) == {"moe_balance_loss", "moe_z_loss"}
    for key, value in output.losses.items():
        torch.testing.assert_close(value, torch.stack([aux[key] for aux in seen]).mean())
        assert value.requires_grad
    load = output.stats["moe_load"]
    assert load.shape == (2, 3) and not load.requires_grad
    torch.testing.assert_close(load[1], (seen[1]["moe_load"] + seen[3]["moe_load"]) / 2)
    torch.testing.assert_close(load.sum(1), torch.ones(2))
    assert not build().forward(ids, segments, labels).losses


def test_dropout_acts_on_embeddings_mixers_and_feed_forwards_in_training_only():
    model = build(dropout=0.3)
    rates = {name: m.p for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {"embeddings.dropout": 0.3, "layers.0.dropout": 0.3, "layers.1.dropout": 0.3}
    ids, segments, _ = batch()
    assert not torch.equal(model.encode(ids, segments), model.encode(ids, segments))
    model.eval()
    assert torch.equal(model.encode(ids, segments), model.encode(ids, segments))


def test_initial_weights_have_the_configured_spread_and_biases_are_zero():
    model = build(hidden_size=128, ffn_hidden_size=256, initializer_range=0.05, tie_word_embeddings=False, use_moe=True)
    layer = model.layers[0]
    weights = [model.embeddings.tokens.weight, model.head.dense.weight, model.head.decoder.weight]
    for weight in [*weights, layer.ffn.up, layer.ffn.down, layer.ffn.router.weight, layer.mixer.projections.qkv.weight]:
        assert weight.std().item() == pytest.approx(0.05, rel=0.08)
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    assert biases and all(bias.eq(0).all() for bias in biases)


def test_tying_shares_the_table_and_untying_does_not():
    tied, untied = build(), build(tie_word_embeddings=False)
    assert sum(n for _, n in parameter_table(untied)) - sum(n for _, n in parameter_table(tied)) == V * 32
    assert dict(parameter_table(untied))["head decoder"] == V * 32
    ids, segments, _ = batch()
    with torch.no_grad():
        before = tied(ids, segments).logits[..., 0].clone(), untied(ids, segments).logits[..., 0].clone()
        for model in (tied, untied):
            model.embeddings.tokens.weight[0] += 1  # id 0 is in no input
        after = tied(ids, segments).logits[..., 0], untied(ids, segments).logits[..., 0]
    assert not torch.allclose(before[0], after[0])
    assert torch.equal(before[1], after[1])


@pytest.mark.parametrize("position", ["none", "learned", "sinusoidal", "rope"])
def test_only_positions_tell_the_order_of_the_tokens(position):
    model = build(position_embedding=position).eval()
    ids = batch()[0]
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    same = torch.allclose(model.encode(ids)[:, order], model.encode(ids[:, order]), atol=1e-5)
    assert same == (position == "none")


def test_state_dict_round_trip_and_parameter_table():
    model, other = build(use_moe=True, norm_type="derf"), build_model(config(use_moe=True, norm_type="derf"))
    ids, segments, _ = batch()
    other.load_state_dict(model.state_dict())
    assert torch.equal(model.encode(ids, segments), other.encode(ids, segments))
    table = parameter_table(model)
    assert sum(count for _, count in table) == sum(p.numel() for p in model.parameters())
    assert [part for part, _ in table][:3] == ["token embeddings", "embedding scales", "embedding norm"]
    assert [part for part, _ in table][-1] == "head bias"


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm", "dynamic_tanh", "derf"])
def test_under_every_norm_the_head_hears_the_encoder_from_the_first_step(norm):
    """With vectors as small as they leave a norm without statistics, only the bias of the head would be learned."""
    model = build(norm_type=norm, hidden_size=256, num_heads=4, ffn_hidden_size=256, vocab_size=512, num_layers=2)
    ids = torch.randint(5, 512, (8, 32), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        spread = model(ids).logits.std(dim=(0, 1)).mean().item()  # over positions, of each token's score
    assert 0.03 < spread < 3, spread


def test_the_encoder_compiles_into_one_graph():
    model = build(use_moe=True, norm_type="dynamic_tanh", num_layers=1, num_loops=2).eval()
    ids, segments, _ = batch()
    compiled = torch.compile(model.encode, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids, segments), model.encode(ids, segments))


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_autocast_stays_near_full_precision(amp):
    model = build(use_moe=True, norm_type="rms_norm").eval()
    ids, segments, labels = batch()
    expected = model(ids, segments, labels)
    with torch.autocast("cpu", amp):
        output = model(ids, segments, labels)
    assert output.loss_sum.dtype == torch.float32
    torch.testing.assert_close(output.loss_sum, expected.loss_sum, rtol=0.02, atol=0)


def test_wrong_segments_and_rows_too_long_are_errors():
    ids, segments, _ = batch()
    with pytest.raises(ValueError, match=r"segments: got shape \(2, 11\), expected that of input_ids \(2, 12\)"):
        build()(ids, segments[:, :11])
    with pytest.raises(ConfigError, match="got a row of 12 tokens, expected at most 8"):
        build(position_embedding="learned", max_position_embeddings=8)(ids)
