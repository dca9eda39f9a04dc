"""Embeddings and head: widths, positions, the convolution's borders, tying."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ultrazoo.errors import ConfigError
from ultrazoo.nn.embeddings import EmbeddingConfig, Embeddings, MaskedLMHead, sinusoids
from ultrazoo.nn.norms import DynamicTanh, LayerNorm, NormConfig

V, D, E = 50, 24, 8


def config(**fields: object) -> EmbeddingConfig:
    return EmbeddingConfig.model_validate({"vocab_size": V, "hidden_size": D, "factorized_embedding_dim": E, **fields})


def build(**fields: object) -> Embeddings:
    torch.manual_seed(0)
    return Embeddings(config(**fields), nn.Identity()).double().eval()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(1))


def test_plain_embeddings_are_the_table_normed():
    module = Embeddings(config(), LayerNorm(NormConfig(hidden_size=D))).eval()
    ids = tokens(2, 7)
    torch.testing.assert_close(module(ids), nn.functional.layer_norm(module.tokens.weight[ids], (D,)))


def test_factorised_embeddings_are_a_product_that_keeps_the_size_of_the_tokens():
    torch.manual_seed(0)
    wide = EmbeddingConfig(vocab_size=4000, hidden_size=256, use_factorized_embedding=True, factorized_embedding_dim=64)
    module = Embeddings(wide, nn.Identity()).eval()
    ids = torch.arange(4000).unsqueeze(0)
    expected = module.tokens.weight @ module.projection.weight.T
    torch.testing.assert_close(module(ids).squeeze(0), expected)
    assert sum(p.numel() for p in module.parameters()) == 4000 * 64 + 64 * 256
    assert expected.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("kernel", [1, 3, 4, 32])
def test_embedding_convolution_is_centred_and_stays_in_its_document(kernel):
    module = build(use_factorized_embedding=True, use_embedding_conv=True, embedding_conv_kernel=kernel)
    first, second = tokens(1, 9), tokens(1, 6).flip(1)
    apart = torch.cat((module(first), module(second)), 1)
    padding = torch.zeros(1, 5, dtype=torch.int64)
    segments = torch.tensor([[1] * 9 + [2] * 6 + [0] * 5])
    packed = module(torch.cat((first, second, padding + 7), 1), segments)
    torch.testing.assert_close(packed[:, :15], apart)
    assert packed[:, 15:].eq(0).all()

    ids = tokens(1, 40)
    changed = ids.clone()
    changed[0, 20] = (ids[0, 20] + 1) % V
    moved = (module(changed) - module(ids)).abs().sum(-1).squeeze(0).nonzero().squeeze(1)
    assert (moved.min().item(), moved.max().item()) == (20 - kernel // 2, 20 + (kernel - 1) // 2)


def test_learned_positions_restart_with_each_document():
    module = build(position_embedding="learned", max_position_embeddings=16)
    ids, segments = tokens(1, 10), torch.tensor([[5] * 4 + [2] * 4 + [0] * 2])
    x = module(ids, segments)
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    torch.testing.assert_close(x[:, :8], module.tokens.weight[ids[:, :8]] + module.positions.weight[places])


def test_a_row_longer_than_the_learned_table_is_an_error():
    module = build(position_embedding="learned", max_position_embeddings=8)
    module(tokens(1, 8))
    with pytest.raises(ConfigError, match=r"max_position_embeddings: got a row of 9 tokens, expected at most 8"):
        module(tokens(1, 9))


def test_sinusoidal_positions_restart_and_bear_a_learned_scale():
    module = build(position_embedding="sinusoidal")
    ids, segments = tokens(1, 6), torch.tensor([[1, 1, 1, 2, 2, 2]])
    table = sinusoids(3, D).double()
    assert module.position_scale.item() == pytest.approx(D**-0.5)
    expected = module.tokens.weight[ids] + module.position_scale * torch.cat((table, table))
    torch.testing.assert_close(module(ids, segments), expected)
    torch.testing.assert_close(table[2, 4].item(), torch.tensor(2 * 10000 ** (-4 / D)).sin().item())
    torch.testing.assert_close(table[2, 5].item(), torch.tensor(2 * 10000 ** (-4 / D)).cos().item())
    assert sinusoids(4, 7).shape == (4, 7)


@pytest.mark.parametrize("position", ["none", "rope"])
def test_no_positions_are_added_for_none_and_rope(position):
    module = build(position_embedding=position)
    x = module(torch.full((1, 5), 3))
    assert x.eq(x[:, :1]).all()


def test_norms_without_statistics_get_a_scale_and_others_do_not():
    bounded = Embeddings(config(), DynamicTanh(NormConfig(hidden_size=D))).eval()
    assert bounded.scale.item() == pytest.approx(D**0.5)
    ids = tokens(2, 5)
    torch.testing.assert_close(bounded(ids), torch.tanh(0.5 * D**0.5 * bounded.tokens.weight[ids]))
    assert Embeddings(config(), LayerNorm(NormConfig(hidden_size=D))).scale is None


def test_padding_gives_zero_and_no_gradient():
    module = Embeddings(config(dropout=0.5), LayerNorm(NormConfig(hidden_size=D)))
    nn.init.ones_(module.norm.bias)
    segments = torch.tensor([[1, 1, 0, 0]])
    x = module(torch.tensor([[4, 5, 6, 7]]), segments)
    assert x[:, 2:].eq(0).all()
    x.sum().backward()
    assert module.tokens.weight.grad[6:8].eq(0).all()


def test_dropout_acts_in_training_only():
    module = Embeddings(config(dropout=0.5), nn.Identity())
    ids = tokens(4, 16)
    share = module(ids).eq(0).float().mean().item()
    assert 0.4 < share < 0.6
    assert module.eval()(ids).ne(0).all()


@pytest.mark.parametrize("factorised", [False, True])
def test_tied_head_reads_out_through_the_token_table(factorised):
    shape = config(use_factorized_embedding=factorised)
    width = E if factorised else D
    head = MaskedLMHead(shape, LayerNorm(NormConfig(hidden_size=width))).double()
    nn.init.normal_(head.bias)
    table, hidden = torch.randn(V, width).double(), torch.randn(2, 3, D).double()
    inner = nn.functional.gelu(hidden @ head.dense.weight.T + head.dense.bias)
    expected = nn.functional.layer_norm(inner, (width,)) @ table.T + head.bias
    torch.testing.assert_close(head(hidden, table), expected)
    assert sum(p.numel() for p in head.parameters()) == D * width + width + 2 * width + V


def test_untied_head_has_its_own_table_of_the_same_shape():
    shape = config(use_factorized_embedding=True, tie_word_embeddings=False, ffn_activation="silu")
    head = MaskedLMHead(shape, nn.Identity()).double()
    hidden, ignored = torch.randn(3, D).double(), torch.full((V, E), torch.nan)
    expected = nn.functional.silu(hidden @ head.dense.weight.T + head.dense.bias) @ head.decoder.weight.T
    torch.testing.assert_close(head(hidden, ignored), expected)
    assert head.decoder.weight.shape == (V, E)


def test_a_head_that_starts_from_counts_scores_them_by_their_log_share():
    config = EmbeddingConfig(vocab_size=7, hidden_size=4)
    head = MaskedLMHead(config, torch.nn.LayerNorm(4))
    head.start_from(torch.tensor([0, 9, 4, 0, 2]))
    expected = torch.tensor([1.0, 10, 5, 1, 3, 1, 1]) / 22
    torch.testing.assert_close(head.bias.detach().exp(), expected)
