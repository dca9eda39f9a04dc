"""Masking: 80/10/10 of the right share, never on special tokens, a function of the row's stream alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_files import TOKENIZER
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ultrazoo.data.masking import Masker, WordRule, word_table
from ultrazoo.data.randomness import draws, key
from ultrazoo.data.tokenizer import Vocabulary, read_vocabulary
from ultrazoo.errors import ConfigError

SHIPPED = read_vocabulary(Path(TOKENIZER), 8192, "test")
NAMES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def batch(rows: int, length: int = 128, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of two documents each and some padding, with special tokens inside."""
    chance = np.random.default_rng(seed)
    ids = chance.integers(5, 8192, (rows, length)).astype(np.uint16)
    segments = np.ones((rows, length), np.uint16)
    segments[:, length // 2 :] = 2
    segments[:, length - 10 :] = 0
    ids[:, [0, length // 2]] = 2
    ids[:, [length // 2 - 1, length - 11]] = 3
    ids[:, length - 10 :] = 0
    return ids, segments, draws(key(seed), np.arange(rows))


@pytest.mark.parametrize("probability", [0.15, 0.4])
def test_shares_of_targets_and_of_what_hides_them(probability: float) -> None:
    ids, segments, states = batch(4000)
    inputs, labels = Masker(SHIPPED, probability)(ids, segments, states)
    target = labels != -100
    ordinary = (segments > 0) & ~SHIPPED.is_special[ids]
    assert not (target & ~ordinary).any()
    count = target.sum()
    # four standard deviations of a binomial share
    assert abs(count / ordinary.sum() - probability) < 4 * np.sqrt(probability * (1 - probability) / ordinary.sum())
    assert np.array_equal(labels[target], ids[target]) and np.array_equal(inputs[~target], ids[~target])
    masked, kept = inputs[target] == SHIPPED.mask, inputs[target] == ids[target]
    for share, wanted in ((masked.mean(), 0.8), (kept.mean(), 0.1), ((~masked & ~kept).mean(), 0.1)):
        assert abs(share - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / count) + 1 / 8000
    replaced = inputs[target][~masked & ~kept]
    assert not SHIPPED.is_special[replaced].any()
    assert np.histogram(replaced, bins=8, range=(5, 8192))[0].std() / (len(replaced) / 8) < 0.05
    per_column = target.mean(axis=0)[ordinary.all(axis=0)]
    assert per_column.min() > 0.8 * probability and per_column.max() < 1.2 * probability


def test_a_row_is_masked_by_its_own_stream_in_any_company() -> None:
    ids, segments, states = batch(32)
    masker = Masker(SHIPPED, 0.15)
    inputs, labels = masker(ids, segments, states)
    again = masker(ids, segments, states)
    assert np.array_equal(inputs, again[0]) and np.array_equal(labels, again[1])
    part = masker(ids[5:7], segments[5:7], states[5:7])
    assert np.array_equal(inputs[5:7], part[0]) and np.array_equal(labels[5:7], part[1])
    same_text = masker(np.repeat(ids[:1], 2, axis=0), np.repeat(segments[:1], 2, axis=0), states[:2])
    assert not np.array_equal(same_text[1][0], same_text[1][1])


def test_ids_of_four_bytes_and_rows_without_targets_work() -> None:
    ids, segments, states = batch(3)
    masker = Masker(SHIPPED, 0.15)
    assert np.array_equal(masker(ids.astype(np.uint32), segments, states)[0], masker(ids, segments, states)[0])
    inputs, labels = masker(np.full((1, 4), 3, np.uint16), np.ones((1, 4), np.uint16), states[:1])
    assert (labels == -100).all() and (inputs == 3).all()


def words_of(tokenizer: Tokenizer, table: WordRule, text: str) -> list[str]:
    """Cut a text into words as a table sees them."""
    encoding = tokenizer.encode(text)
    ids = np.array([encoding.ids])
    starts = table.word_starts(ids, np.ones_like(ids))[0]
    words: list[str] = []
    for token, start in zip(encoding.tokens, starts, strict=True):
        if start or not words:
            words.append("")
        words[-1] += token.replace("Ġ", "").replace("##", "").replace("▁", "")
    return words


def test_words_of_byte_level_bpe() -> None:
    table, tokenizer = word_table(SHIPPED), SHIPPED.tokenizer()
    text = 'The kingdom, of "Nabucodonosor"-- niño; 1909. 日本'
    expected = ["[CLS]", "The", "kingdom", ",", "of", '"', "Nabucodonosor", '"--', "niÃ±o", ";", "1909", "."]
    found = words_of(tokenizer, table, text)
    assert found[: len(expected)] == expected
    assert found[-1] == "[SEP]" and len(found) == len(expected) + 3  # a word per sign


def _vocabulary(tokenizer: Tokenizer, folder: Path) -> Vocabulary:
    tokenizer.add_special_tokens(NAMES)
    tokenizer.save(str(folder / "t.json"))
    return read_vocabulary(folder / "t.json", 100, "test")


def test_words_of_wordpiece(tmp_path: Path) -> None:
    vocab = {name: i for i, name in enumerate([*NAMES, "play", "##ing", "##ed", "the", ","])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    table = word_table(_vocabulary(tokenizer, tmp_path))
    assert words_of(tokenizer, table, "the playing, played") == ["the", "playing", ",", "played"]


def test_words_of_metaspace_and_of_a_tokenizer_without_marks(tmp_path: Path) -> None:
    vocab = {name: i for i, name in enumerate([*NAMES, "▁", "p", "l", "a", ",", "▁p"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("▁", "p")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    table = word_table(_vocabulary(tokenizer, tmp_path))
    assert words_of(tokenizer, table, "pla, alp lap") == ["pla", ",", "alp", "lap"]
    unmarked = Tokenizer(models.WordLevel({name: i for i, name in enumerate([*NAMES, "a"])}, unk_token="[UNK]"))
    with pytest.raises(ConfigError, match=r"training\.whole_word_masking: .*does not mark where words begin"):
        word_table(_vocabulary(unmarked, tmp_path))


def test_whole_words_are_targets_together_and_shares_hold() -> None:
    ids, segments, states = batch(4000)
    table = word_table(SHIPPED)
    _, labels = Masker(SHIPPED, 0.15, table)(ids, segments, states)
    target, starts = labels != -100, table.word_starts(ids, segments)
    ordinary = (segments > 0) & ~SHIPPED.is_special[ids]
    continues = ordinary[:, 1:] & ordinary[:, :-1] & ~starts[:, 1:]
    assert continues.mean() > 0.1
    assert np.array_equal(target[:, 1:][continues], target[:, :-1][continues])
    assert not (target & ~ordinary).any()
    assert abs(target.sum() / ordinary.sum() - 0.15) < 0.005
    assert starts[:, 64].all(), "a document begins a word"
