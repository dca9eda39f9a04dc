"""Words for whole-word masking: of scripts with and without spaces, in tokens of several characters or of parts."""

from __future__ import annotations

import random
import unicodedata
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli_parts import call, write_config
from data_files import TOKENIZER
from test_verify import change_state
from tokenizer_parts import vocabulary_of
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from ultrazoo.data.codec import TextCodec
from ultrazoo.data.encoding import Encoder
from ultrazoo.data.masking import WORD_RULE, Masker, word_table
from ultrazoo.data.packing import Documents, Frame, pack
from ultrazoo.data.randomness import draws, key
from ultrazoo.data.tokenizer import Vocabulary, read_vocabulary, train
from ultrazoo.data.words import LONGEST, is_unspaced
from ultrazoo.revisions import RULES, current_revisions
from ultrazoo.train.verify import verify_run

SIGNS = "天地玄黃宇宙洪荒日月盈昃辰宿列張寒來暑往秋收冬藏閏餘成歲律呂調陽雲騰致雨露結為霜金生麗水玉出崑岡"
KANA = "ひらがなとカタカナがまざったぶんしょうです"
THAI = "ภาษาไทยเขียนติดกันไม่เว้นวรรคระหว่างคำ"
LAO, KHMER, MYANMAR = "ພາສາລາວບໍ່ມີຊ່ອງຫວ່າງ", "ភាសាខ្មែរគ្មានដកឃ្លា", "မြန်မာစာသည်စာလုံးခြားမရေး"
UNSPACED = {"han": SIGNS, "kana": KANA, "thai": THAI, "lao": LAO, "khmer": KHMER, "myanmar": MYANMAR}
SHIPPED = read_vocabulary(Path(TOKENIZER), 8192, "test")


def sentences(alphabet: str, count: int = 200) -> list[str]:
    chance = random.Random(0)
    return ["".join(chance.choices(alphabet, k=chance.randint(40, 100))) + "。" for _ in range(count)]


@cache
def byte_level(alphabet: str) -> Vocabulary:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return vocabulary_of(train(iter(sentences(alphabet)), 400), Path(folder))


def words_of(vocabulary: Vocabulary, text: str) -> list[str]:
    """Cut a text into words, bytes of no whole character as U+FFFD."""
    codec = TextCodec(vocabulary)
    (ids,) = codec.heads([text], 500)
    row = np.array([[vocabulary.cls, *ids, vocabulary.sep]])
    starts = word_table(vocabulary).word_starts(row, np.ones_like(row))[0, 1:-1]
    found = [b""]
    for start, spelling in zip(starts, codec.spellings(ids), strict=True):
        if start and found[-1]:
            found.append(b"")
        found[-1] += spelling
    return [word.decode(errors="replace").strip(" ") for word in found]


@pytest.mark.parametrize("script", UNSPACED)
def test_a_row_without_spaces_is_neither_hidden_nor_left_alone(script: str) -> None:
    vocabulary = byte_level(UNSPACED[script])
    ids, sizes = Encoder(vocabulary, threads=1).encode(sentences(UNSPACED[script]))
    tokens, segments = pack(
        Documents(ids, np.cumsum(sizes) - sizes, sizes),
        Frame(128, vocabulary.pad, vocabulary.cls, vocabulary.sep),
        packed=False,
        key=None,
    )
    states = draws(key(5), np.arange(len(tokens)))
    _, labels = Masker(vocabulary, 0.15, word_table(vocabulary))(tokens, segments, states)
    real = ((segments > 0) & ~vocabulary.is_special[tokens]).sum(1)
    shares = (labels != -100).sum(1) / real
    assert len(shares) >= 200 and shares.max() < 0.6
    assert (shares == 0).mean() < 0.05 and abs(shares.mean() - 0.15) < 0.02


@pytest.mark.parametrize("script", UNSPACED)
def test_a_word_without_spaces_is_a_letter_with_its_marks_or_a_token(script: str) -> None:
    vocabulary = byte_level(UNSPACED[script])
    codec = TextCodec(vocabulary)
    text = UNSPACED[script]
    (ids,) = codec.heads([text], 500)
    longest = max(len(spelling.decode(errors="ignore")) for spelling in codec.spellings(ids))
    words = words_of(vocabulary, text)
    assert "".join(words) == text
    assert all(not unicodedata.category(word[0]).startswith("M") for word in words)
    assert all(sum(not unicodedata.category(c).startswith("M") for c in word) <= max(longest, 1) for word in words)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("天地 and k天k", ["天", "地", "and", "k", "天", "k"]),
        ("2024年3月", ["2024", "年", "3", "月"]),
        ("日本のラーメン", list("日本のラーメン")),
        ("ที่นี่", ["ที่", "นี่"]),
        ("हिन्दी में लिखा", ["हिन्दी", "में", "लिखा"]),
        ("می\u200cرفت تند", ["می\u200cرفت", "تند"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("ok🙂🙂no", ["ok", "🙂", "🙂", "no"]),
        ("葛\U000e0100城", ["葛\U000e0100", "城"]),
        ("niño e\u0301l", ["niño", "él"]),
        ("a\n\nb", ["a", "\n", "\n", "b"]),
    ],
)
def test_words_that_bytes_and_pairs_of_characters_spell(text: str, expected: list[str]) -> None:
    assert words_of(SHIPPED, text) == expected


def test_a_run_of_letters_without_an_end_is_cut() -> None:
    words = words_of(SHIPPED, "ACGT" * 100)
    assert "".join(words) == "ACGT" * 100
    assert len(words) >= 400 / LONGEST and max(map(len, words)) <= LONGEST + max(map(len, words_of(SHIPPED, "ACGT")))


def test_wordpiece_and_metaspace_without_spaces(tmp_path: Path) -> None:
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = Tokenizer(
        models.WordPiece({n: i for i, n in enumerate([*names, "天", "##地", "##玄", "##k", "a"])}, unk_token="[UNK]")
    )
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    assert words_of(vocabulary_of(pieces, tmp_path), "天地玄k a") == ["天", "地", "玄", "k", "a"]
    pieces.normalizer = normalizers.BertNormalizer(handle_chinese_chars=True)
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=100, special_tokens=names, unk_token="[UNK]", show_progress=False)
    unigram.train_from_iterator(["天 地 玄", "地天 玄", "玄 天地", "a b"], trainer)
    assert words_of(vocabulary_of(unigram, tmp_path), "天地玄 a") == ["天", "地", "玄", "a"]


def reference(text: str) -> list[bool]:
    """Whether each character begins a word, decided one after the other."""
    begins: list[bool] = []
    base, age = "\n", 0
    for letter in text:
        if unicodedata.category(letter)[0] == "M" or letter in "\u200c\u200d":
            begins.append(False)
            age += 1
            continue
        plain = letter.isalnum() and not is_unspaced(letter)
        joins = plain and base.isalnum() and not is_unspaced(base) and age < LONGEST
        joins |= base == " " and letter != " "
        begins.append(not joins)
        base, age = letter, age + 1 if joins else 1
    return begins


def test_word_starts_equal_those_of_a_plain_loop_over_characters(tmp_path: Path) -> None:
    alphabet = "abcde fgh, 12é\u0301\u200d" + SIGNS[:5] + THAI[:8] + "हिन्दी🙂한"
    chance = random.Random(1)
    single = Tokenizer(models.BPE(unk_token="[UNK]"))
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    single = Tokenizer(
        models.BPE({n: i for i, n in enumerate([*names, *sorted(set(alphabet))])}, [], unk_token="[UNK]")
    )
    vocabulary = vocabulary_of(single, tmp_path)
    rule, tokenizer = word_table(vocabulary), vocabulary.tokenizer()
    for _ in range(200):
        text = "".join(chance.choices(alphabet, k=60)) + "ab" * chance.randint(0, 40)
        ids = np.array([tokenizer.encode(text, add_special_tokens=False).ids])
        found = rule.word_starts(ids, np.ones_like(ids))[0]
        expected = np.array(reference(text))
        expected[0] = True
        assert np.array_equal(found, expected), text


def test_the_words_of_a_row_do_not_depend_on_the_rows_beside_it() -> None:
    rule = word_table(SHIPPED)
    rows = np.random.default_rng(0).integers(0, 400, (64, 40))  # mostly bytes, characters cut at every edge
    segments = np.ones_like(rows)
    together = rule.word_starts(rows, segments)
    for place in range(64):
        assert np.array_equal(rule.word_starts(rows[place : place + 1], segments[:1])[0], together[place])
    assert np.array_equal(rule.word_starts(rows.astype(np.uint16), segments), together)


def test_documents_and_special_tokens_part_words() -> None:
    the = SHIPPED.tokenizer().token_to_id("ing")
    rule = word_table(SHIPPED)
    row = np.array([[the, the, SHIPPED.sep, the, the, the]])
    starts = rule.word_starts(row, np.array([[1, 1, 1, 1, 2, 2]]))
    assert starts.tolist() == [[True, False, True, True, True, False]]


def test_a_run_that_began_under_the_first_rule_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(tmp_path)
    pq.write_table(pa.table({"text": sentences(SIGNS)}), tmp_path / "texts.parquet")
    sets = ("--set", "training.whole_word_masking=true", "--set", "training.max_steps=2")
    with monkeypatch.context() as patch:
        patch.setattr("ultrazoo.train.run.current_revisions", lambda: current_revisions() | {"whole_words": 1})
        assert call("train", config, "--output-dir", tmp_path / "run", *sets) == 0
    found = verify_run(tmp_path / "run")
    assert found is not None and found.first_difference is None
    change_state(tmp_path / "run/checkpoints/step-000002", revisions=current_revisions())
    found = verify_run(tmp_path / "run")
    assert found is not None and found.differ["weights"]


def test_the_first_rule_parts_words_as_it_did() -> None:
    text = "el corazón, 日本 no"
    ids = np.array([SHIPPED.tokenizer().encode(text, add_special_tokens=False).ids])
    segments = np.ones_like(ids)
    first, latest = (word_table(SHIPPED, revision).word_starts(ids, segments) for revision in (1, WORD_RULE))
    assert first.sum() == latest.sum() - 1
    assert RULES["whole_words"].current == WORD_RULE == 2
