"""Using a trained encoder: the right checkpoint is loaded, masks are filled and texts become vectors."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from cli_parts import train_tiny
from torch.testing import assert_close

from ultrazoo.errors import CheckpointError, DataError
from ultrazoo.inference import Encoder, find_checkpoint, load

TEXTS = ["the king", "la reina de la tierra y el mar", "", "the queen of the sea saw the land", "mar"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tiny(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def encoder(run: Path) -> Encoder:
    return load(run, "cpu")


def test_a_run_means_its_best_checkpoint_else_its_latest(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    checkpoints = copy / "checkpoints"
    latest = checkpoints / (checkpoints / "latest").read_text().strip()
    shutil.copytree(latest, checkpoints / "step-000001")
    (checkpoints / "best").write_text("step-000001\n")
    assert find_checkpoint(copy) == checkpoints / "step-000001"
    (checkpoints / "best").unlink()
    assert find_checkpoint(copy) == latest
    assert find_checkpoint(latest) == latest


def test_a_place_without_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        load(tmp_path / "nowhere")


def test_a_damaged_checkpoint_is_refused(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(find_checkpoint(run), tmp_path / "step-000006")
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not have the SHA-256"):
        load(copy)


def test_loading_draws_nothing_from_the_random_stream(run: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load(run, "cpu")
    assert torch.equal(torch.rand(3), expected)


def test_fill_mask_gives_the_models_own_probabilities(encoder: Encoder) -> None:
    vocabulary = encoder.vocabulary
    body = vocabulary.tokenizer().encode("the [MASK] of the sea [MASK]", add_special_tokens=False).ids
    ids = torch.tensor([[vocabulary.cls, *body, vocabulary.sep]])
    with torch.inference_mode():
        shares = encoder.model(ids).logits.softmax(-1)[ids.eq(vocabulary.mask)]  # (2, V)
    filled = encoder.fill_mask("the [MASK] of the sea [MASK]", top_k=7)
    assert len(filled) == 2
    for candidates, expected in zip(filled, shares, strict=True):
        values, indices = expected.topk(7)
        assert [candidate.token_id for candidate in candidates] == indices.tolist()
        assert_close(torch.tensor([candidate.probability for candidate in candidates]), values)
    everything = encoder.fill_mask("[MASK]", top_k=10_000)[0]
    assert len(everything) == vocabulary.size
    assert sum(candidate.probability for candidate in everything) == pytest.approx(1, abs=1e-5)


def test_a_candidate_reads_as_it_stands_in_a_text(encoder: Encoder) -> None:
    tokens = {candidate.token for candidate in encoder.fill_mask("[MASK]", top_k=10_000)[0]}
    assert {" the", "k", "[PAD]"} <= tokens


def test_fill_mask_without_a_mask_or_with_one_out_of_reach(encoder: Encoder) -> None:
    with pytest.raises(DataError, match=r"without \[MASK\]") as raised:
        encoder.fill_mask("the king")
    assert raised.value.exit_code == 2
    with pytest.raises(DataError, match=r"beyond the first 32 tokens"):
        encoder.fill_mask("[MASK]" + " the king" * 40 + " [MASK]")


def test_encode_is_the_mean_over_the_texts_own_tokens(encoder: Encoder) -> None:
    vocabulary = encoder.vocabulary
    vectors = encoder.encode(TEXTS)
    assert vectors.shape == (len(TEXTS), 32) and vectors.dtype == torch.float32
    for text, vector in zip(TEXTS, vectors, strict=True):
        body = vocabulary.tokenizer().encode(text, add_special_tokens=False).ids
        with torch.inference_mode():
            hidden = encoder.model.encode(torch.tensor([[vocabulary.cls, *body, vocabulary.sep]]))[0]
        assert_close(vector, hidden.mean(0))


def test_a_vector_depends_neither_on_batches_nor_on_neighbours(encoder: Encoder) -> None:
    expected = encoder.encode(TEXTS)
    assert_close(encoder.encode(TEXTS, batch_size=2), expected)
    assert_close(encoder.encode(TEXTS[::-1]).flip(0), expected)
    assert encoder.encode([]).shape == (0, 32)


def test_text_that_spells_a_special_token_is_text_to_encode(encoder: Encoder) -> None:
    as_text = encoder.encode(["the [MASK]"])
    encoder.fill_mask("the [MASK]")
    assert torch.equal(encoder.encode(["the [MASK]"]), as_text)
    vocabulary = encoder.vocabulary
    ids = vocabulary.tokenizer().encode("the [MASK]", add_special_tokens=False).ids
    with torch.inference_mode():
        as_mask = encoder.model.encode(torch.tensor([[vocabulary.cls, *ids, vocabulary.sep]]))[0].mean(0)
    assert not torch.allclose(as_text[0], as_mask, atol=1e-3)


def test_a_long_text_loses_its_end_with_a_warning(encoder: Encoder, caplog: pytest.LogCaptureFixture) -> None:
    long = "the king " * 100
    with caplog.at_level(logging.WARNING, "ultrazoo"):
        vectors = encoder.encode([long, long + "la reina", "mar"])
    assert_close(vectors[0], vectors[1])
    assert "2 of 3 text(s) are longer than 32 tokens" in caplog.text
