"""Using a trained encoder: the right checkpoint is loaded, masks are filled and texts become vectors."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_parts import train_tiny
from tokenizer_parts import vocabulary_of
from tokenizers import Tokenizer, models
from torch.testing import assert_close

from ultrazoo.errors import ArgumentError, ArgumentTypeError, CheckpointError, ConfigError, DataError
from ultrazoo.inference import Encoder, TextError, find_checkpoint, load
from ultrazoo.model import build_model

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


def test_candidates_are_tokens_that_the_tokenizer_has(encoder: Encoder, tmp_path: Path) -> None:
    vocab = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "king": 9, "sea": 290}
    vocabulary = vocabulary_of(Tokenizer(models.WordLevel(vocab, unk_token="[UNK]")), tmp_path)
    model = build_model(encoder.config.model)
    with torch.no_grad():
        model.head.bias[[7, 299]] = 100.0  # of no token, and beyond the last one
    found = Encoder(model, vocabulary, encoder.config).fill_mask("[MASK]", top_k=300)[0]
    assert sorted(candidate.token_id for candidate in found) == [0, 1, 2, 3, 4, 9, 290]


def test_a_wrong_argument_is_named(encoder: Encoder) -> None:
    for texts in ("hello", b"hello", Path("hello"), {"hello": 1}, {"hello"}, 3, None):
        with pytest.raises(ArgumentTypeError, match=r"texts: got .*expected a list of texts"):
            encoder.encode(texts)
    for texts, got in ((["a", None], "NoneType"), (["a", 3], "int"), (("a", b"b"), "bytes"), (["a", ["b"]], "list")):
        with pytest.raises(TypeError, match=rf"texts\[1\]: got {got} .*expected str"):
            encoder.encode(texts)
    with pytest.raises(TextError, match=r"texts\[1\]: got a lone surrogate U\+D800 at character 2, expected text"):
        encoder.encode(["a", "ab\ud800"])
    with pytest.raises(ValueError, match=r"texts\[0\]: got byte 0xFF, which is not UTF-8, at character 1"):
        encoder.encode([b"a\xff".decode(errors="surrogateescape")])
    for size in (0, -1):
        with pytest.raises(ArgumentError, match=rf"batch_size: got {size}, expected at least 1"):
            encoder.encode(["a"], batch_size=size)
        with pytest.raises(ArgumentError, match=rf"top_k: got {size}, expected at least 1"):
            encoder.fill_mask("[MASK]", top_k=size)
    for size in (1.0, "2", True, None):
        with pytest.raises(ArgumentTypeError, match=r"top_k: got .*expected a whole number"):
            encoder.fill_mask("[MASK]", top_k=size)
    for text in (None, ["[MASK]"], b"[MASK]"):
        with pytest.raises(ArgumentTypeError, match=r"text: got .*expected str"):
            encoder.fill_mask(text)
    with pytest.raises(TextError, match=r"text: got a lone surrogate"):
        encoder.fill_mask("[MASK] \udfff")


def test_texts_may_come_from_anything_in_order(encoder: Encoder) -> None:
    expected = encoder.encode(TEXTS)
    assert torch.equal(encoder.encode(iter(TEXTS), batch_size=np.int64(32)), expected)
    assert torch.equal(encoder.encode(np.array(TEXTS)), expected)


def test_threads_share_an_encoder(encoder: Encoder) -> None:
    alone = encoder.encode(["the [MASK] of"])
    filled = encoder.fill_mask("the [MASK]", 2)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as pool:
            vectors = [pool.submit(encoder.encode, ["the [MASK] of"]) for _ in range(100)]
            masks = [pool.submit(encoder.fill_mask, "the [MASK]", 2) for _ in range(100)]
            for vector in vectors:
                assert_close(vector.result(), alone)
            assert all([c.token_id for c in mask.result()[0]] == [c.token_id for c in filled[0]] for mask in masks)
    finally:
        sys.setswitchinterval(before)


def test_the_files_that_inference_does_not_use_may_be_missing_or_damaged(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(find_checkpoint(run), tmp_path / "step-000006")
    expected = load(copy, "cpu").encode(["the king"])
    (copy / "optimizer.safetensors").unlink()
    (copy / "state.json").write_text("damaged")
    assert torch.equal(load(copy, "cpu").encode(["the king"]), expected)
    for name in ("tokenizer.json", "config.yaml", "model.safetensors"):
        (copy / name).rename(copy / "away")
        with pytest.raises(CheckpointError, match=rf"{name} is missing"):
            load(copy, "cpu")
        (copy / "away").rename(copy / name)


@pytest.mark.parametrize("name", ["gpu", "CPU:0", "", "cuda:", "cuda:-1", "cpu\n", "cuda:٣"])
def test_an_unknown_device_lists_those_there_are(run: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"^device: got .*expected one of auto, cpu, cuda, cuda:N, mps"):
        load(run, name)


def test_a_torch_device_is_a_device(run: Path) -> None:
    assert load(run, torch.device("cpu")).device == torch.device("cpu")


def test_only_the_beginning_of_a_long_text_is_tokenised(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sizes: list[int] = []
    encode = encoder._codec._encode
    monkeypatch.setattr(encoder._codec, "_encode", lambda texts: (sizes.extend(map(len, texts)), encode(texts))[1])
    long = "the king of the sea " * 100_000
    vectors = encoder.encode([long, "mar", long[:4000]])
    assert sum(sizes) < 10_000
    assert_close(vectors[0], vectors[2])
    with caplog.at_level(logging.WARNING, "ultrazoo"):
        encoder.fill_mask("[MASK] " + long)
    assert "1 of 1 text(s) are longer than 32 tokens" in caplog.text
    with pytest.raises(TextError, match="beyond the first 32 tokens"):
        encoder.fill_mask(long + "[MASK]")
    assert sum(sizes) < 30_000


def test_inference_imports_without_the_modules_that_only_unix_has() -> None:
    program = (
        "import sys\n"
        "for name in ('fcntl', 'resource', 'pwd', 'grp', 'termios', 'tty', 'pty'):\n"
        "    sys.modules[name] = None\n"
        "import ultrazoo.inference, ultrazoo.cli, ultrazoo.plot, ultrazoo.data.convert, ultrazoo.train.run\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


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
