"""Tokenizers: retrained to the same file, checked against the model, blind to special tokens spelt in text."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from data_files import TOKENIZER, make_texts, settings, write
from tokenizers import Tokenizer, models, pre_tokenizers

from ultrazoo.data import build_data
from ultrazoo.data.encoding import Encoder
from ultrazoo.data.reading import RowReader
from ultrazoo.data.sources import Span, open_source
from ultrazoo.data.tokenizer import SPECIALS, read_vocabulary, sample, train
from ultrazoo.errors import ConfigError


def corpus_texts(rows: int = 256) -> list[str]:
    """Rows of both languages of the embedded corpus."""
    source, skipped = open_source(None), Counter[str]()
    reader = RowReader(source)
    spans = [Span(unit, 0, min(rows, source.units[unit].rows)) for unit in (0, len(source.units) - 2)]
    return [text for span in spans for text in reader.read(span, None, skipped) if text is not None]


def test_byte_level_bpe_retrains_to_the_same_file() -> None:
    texts = corpus_texts()
    files = {train(texts, 1000).to_str() for _ in range(3)}
    assert len(files) == 1
    tokenizer = Tokenizer.from_str(files.pop())
    assert tokenizer.get_vocab_size() == 1000
    assert [tokenizer.token_to_id(name) for name in SPECIALS] == [0, 1, 2, 3, 4]


def test_the_shipped_tokenizer_fits_both_languages() -> None:
    vocabulary = read_vocabulary(Path(TOKENIZER), 8192, "test")
    assert vocabulary.sha256 == hashlib.sha256(Path(TOKENIZER).read_bytes()).hexdigest()
    assert (vocabulary.pad, vocabulary.cls, vocabulary.sep, vocabulary.mask, vocabulary.size) == (0, 2, 3, 4, 8192)
    tokenizer, texts = vocabulary.tokenizer(), corpus_texts(100)
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    assert sum(len(text.encode()) for text in texts) / sum(len(e.ids) for e in encodings) > 3.8
    assert not any(1 in e.ids for e in encodings)
    assert all(tokenizer.decode(e.ids).strip() == text.strip() for e, text in zip(encodings, texts, strict=True))


def test_accents_case_and_foreign_bytes_survive() -> None:
    tokenizer = Tokenizer.from_file(TOKENIZER)
    for text in ("El corazón del NIÑO, ¿cómo?", "naïve façade", "日本語 🙂"):
        assert tokenizer.decode(tokenizer.encode(text).ids).strip() == text
    assert tokenizer.encode("corazo\u0301n").ids == tokenizer.encode("corazón").ids
    assert tokenizer.encode("uno").tokens[0] == "[CLS]" and tokenizer.encode("uno").tokens[-1] == "[SEP]"


@pytest.mark.parametrize("threads", [1, 3])
def test_encoding_keeps_rows_apart_and_special_tokens_in_text_stay_text(threads: int) -> None:
    vocabulary = read_vocabulary(Path(TOKENIZER), 8192, "test")
    texts = [*make_texts(300), "the [MASK] of [SEP] and [CLS]", "x"]
    ids, lengths = Encoder(vocabulary, threads).encode(texts)
    assert ids.dtype == np.uint16 and len(ids) == lengths.sum() and ids.min() > 4
    parts = np.split(ids, np.cumsum(lengths)[:-1])
    tokenizer = vocabulary.tokenizer()
    assert [tokenizer.decode(part.tolist()).strip() for part in parts] == texts


def test_a_given_tokenizer_is_used_without_its_truncation_and_padding(tmp_path: Path) -> None:
    write(tmp_path / "data/a.parquet", make_texts(40, longest=200))
    tokenizer = Tokenizer.from_file(TOKENIZER)
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=64)
    path = tmp_path / "own.json"
    tokenizer.save(str(path))
    plain = build_data(settings(tmp_path), 8192, lambda line: None)
    own = build_data(settings(tmp_path, tokenizer=str(path)), 8192, lambda line: None)
    assert own.tokenizer_sha256 == hashlib.sha256(path.read_bytes()).hexdigest() != plain.tokenizer_sha256
    assert own.stats["tokens"] == plain.stats["tokens"]


def test_a_byte_order_mark_before_a_tokenizer_is_no_part_of_it(tmp_path: Path) -> None:
    content = Path(TOKENIZER).read_bytes()
    (tmp_path / "own.json").write_bytes(b"\xef\xbb\xbf" + content)
    assert read_vocabulary(tmp_path / "own.json", 8192, "test").sha256 == hashlib.sha256(content).hexdigest()


def test_other_names_and_ids_of_special_tokens_are_found(tmp_path: Path) -> None:
    vocab = {"<s>": 0, "<pad>": 1, "</s>": 2, "a": 3, "<mask>": 4}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="a"))
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<mask>"])
    tokenizer.save(str(tmp_path / "t.json"))
    vocabulary = read_vocabulary(tmp_path / "t.json", 5, "test")
    assert (vocabulary.pad, vocabulary.cls, vocabulary.sep, vocabulary.mask) == (1, 0, 2, 4)
    assert vocabulary.special_ids == (0, 1, 2, 4) and vocabulary.is_special.tolist() == [True, True, True, False, True]


def test_tokenizers_that_do_not_fit_are_refused_with_numbers(tmp_path: Path) -> None:
    write(tmp_path / "data/a.parquet", make_texts(10))
    with pytest.raises(ConfigError, match=r"training\.tokenizer: .*8192 entries.*up to 8191.*vocab_size is 8000.*8192"):
        build_data(settings(tmp_path), 8000, lambda line: None)
    with pytest.raises(ConfigError, match=r"training\.tokenizer: .*none\.json cannot be read"):
        build_data(settings(tmp_path, tokenizer=str(tmp_path / "none.json")), 8192, lambda line: None)
    (tmp_path / "bad.json").write_text('{"model": 3}')
    with pytest.raises(ConfigError, match=r"bad\.json is not a tokenizer\.json"):
        read_vocabulary(tmp_path / "bad.json", 8192, "training.tokenizer")
    bare = Tokenizer(models.WordLevel({"[PAD]": 0, "[CLS]": 1, "a": 2}, unk_token="a"))
    bare.save(str(tmp_path / "bare.json"))
    with pytest.raises(ConfigError, match=r"lacks the special token\(s\) \[SEP\] or <sep>, \[MASK\] or <mask>"):
        read_vocabulary(tmp_path / "bare.json", 8192, "training.tokenizer")


def test_a_tokenizer_is_trained_once_per_data_and_size(tmp_path: Path) -> None:
    write(tmp_path / "data/a.parquet", make_texts(200))
    config = settings(tmp_path, tokenizer=None)
    lines: list[str] = []
    first = build_data(config, 400, lines.append)
    assert any("trained from the data" in line for line in lines)
    assert first.tokenizer.get_vocab_size() <= 400
    lines.clear()
    assert build_data(config, 400, lines.append).tokenizer_sha256 == first.tokenizer_sha256
    assert not any("trained" in line for line in lines)
    assert build_data(config, 300, lines.append).tokenizer_sha256 != first.tokenizer_sha256
    with pytest.raises(ConfigError, match=r"model\.vocab_size: got 260, expected at least 261"):
        build_data(config, 260, lines.append)


def test_the_embedded_corpus_uses_the_shipped_file_and_trains_other_sizes(tmp_path: Path) -> None:
    config = settings(tmp_path, local_parquet_dir=None, tokenizer=None, max_samples=300)
    shipped = build_data(config, 8192, lambda line: None)
    assert shipped.tokenizer_sha256 == hashlib.sha256(Path(TOKENIZER).read_bytes()).hexdigest()
    assert build_data(config, 500, lambda line: None).tokenizer.get_vocab_size() == 500


def test_training_text_comes_from_all_over_and_stops_at_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = make_texts(400)
    source = open_source(str(write(tmp_path / "a.parquet", texts, group=20)))
    assert sorted(sample(source, print)) == sorted(texts)
    monkeypatch.setattr("ultrazoo.data.tokenizer.TRAINING_BYTES", sum(len(text.encode()) for text in texts) // 4)
    groups = {texts.index(text) // 20 for text in sample(source, print)}
    assert 3 <= len(groups) <= 8 and max(groups) - min(groups) > len(groups)


def test_text_beyond_a_tokenizers_alphabet_is_not_fatal(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[MASK]": 3, "el": 4}, unk_token="el"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[PAD]", "[CLS]", "[SEP]", "[MASK]"])
    ids, lengths = Encoder(read_vocabulary(_save(tokenizer, tmp_path), 5, "test"), threads=1).encode(
        ["el rey", "\u200b", "el"]
    )
    assert lengths.tolist() == [2, len(ids) - 3, 1]


def _save(tokenizer: Tokenizer, folder: Path) -> Path:
    path = folder / "saved.json"
    path.write_text(json.dumps(json.loads(tokenizer.to_str())))
    return path
