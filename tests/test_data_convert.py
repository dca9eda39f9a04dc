"""Text and JSON lines -> Parquet: every document once, bad lines counted, no half-written file."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from data_files import build, flip, make_texts

from ultrazoo.data.convert import convert_to_parquet
from ultrazoo.data.reading import RowReader
from ultrazoo.data.sources import Span, open_source
from ultrazoo.errors import DataError


def rows(path: Path) -> list[tuple[str, str]]:
    table = pq.read_table(path)
    return list(zip(table["text"].to_pylist(), table["source"].to_pylist(), strict=True))


def test_documents_of_text_files_end_at_blank_lines(tmp_path: Path) -> None:
    content = "\ufeffUno.\r\nSigue.\r\n\r\n \t\r\nDos: corazón\r\n\r\n\r\nTres"
    (tmp_path / "a.txt").write_bytes(content.encode())
    (tmp_path / "b.txt").write_text("x" * 3_000_000)
    result = convert_to_parquet([tmp_path], tmp_path / "out/all.parquet")
    found = rows(tmp_path / "out/all.parquet")
    assert [text for text, _ in found[:3]] == ["Uno.\nSigue.", "Dos: corazón", "Tres"]
    assert [source for _, source in found] == ["a.txt"] * 3 + ["b.txt"] and len(found[3][0]) == 3_000_000
    assert (result.rows, result.files, result.skipped) == (4, 2, {})


def test_linked_folders_are_read_too(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.txt").write_text("uno")
    (tmp_path / "texts/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "texts/linked/round").symlink_to(tmp_path / "texts")
    assert convert_to_parquet([tmp_path / "texts"], tmp_path / "out.parquet").files == 1


def test_json_lines_and_their_bad_lines(tmp_path: Path) -> None:
    lines = [
        json.dumps({"text": "uno", "id": 1}).encode(),
        b'{"text": "dos"',
        b"[1, 2]",
        b'{"id": 3}',
        b'{"text": null}',
        b'{"text": 5}',
        b'{"text": "  "}',
        b"",
        b'{"text": "caf\xe9"}',
        rb'{"text": "\ud800"}',
        rb'{"text": "caf\u00e9 \ud83d\ude42"}',
        b"[" * 100_000,
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    result = convert_to_parquet([tmp_path / "a.jsonl"], tmp_path / "a.parquet")
    assert rows(tmp_path / "a.parquet") == [("uno", "a.jsonl"), ("café 🙂", "a.jsonl")]
    assert result.skipped == {
        "not JSON": 2,
        "not a JSON object": 1,
        "no key 'text'": 1,
        "null": 1,
        "not text": 1,
        "empty": 1,
        "invalid UTF-8": 2,
    }


def test_the_output_trains_and_its_pages_carry_checksums(tmp_path: Path) -> None:
    texts = make_texts(5000, longest=40)
    with (tmp_path / "a.ndjson").open("w") as file:
        file.writelines(json.dumps({"content": text}) + "\n" for text in texts)
    lines: list[str] = []
    result = convert_to_parquet(
        [tmp_path / "a.ndjson"], tmp_path / "data/a.parquet", text_key="content", console=lines.append
    )
    assert [text for text, _ in rows(tmp_path / "data/a.parquet")] == texts
    assert result.rows == 5000 and result.bytes == sum(len(text.encode()) for text in texts)
    source = open_source(str(tmp_path / "data"))
    assert [unit.rows for unit in source.units] == [2000, 2000, 1000]
    assert build(tmp_path, max_samples=100).rows_per_epoch > 10
    flip(tmp_path / "data/a.parquet", group=1)
    with pytest.raises(DataError, match="row group 1 is damaged"):
        RowReader(open_source(str(tmp_path / "data"), on_bad_data="error")).read(Span(1, 0, 2000), None, {})  # type: ignore[arg-type]


def test_long_documents_make_smaller_row_groups(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(["y" * 1_000_000] * 9))
    convert_to_parquet([tmp_path / "a.txt"], tmp_path / "a.parquet")
    assert [unit.rows for unit in open_source(str(tmp_path / "a.parquet")).units] == [5, 4]


def test_errors_name_the_input_and_leave_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"texto": "uno", "id": 3}\n')
    output = tmp_path / "out.parquet"
    with pytest.raises(
        DataError, match=r"a\.jsonl: no usable document \(1 no key 'text'\); did you mean 'texto'\?.*id, texto"
    ):
        convert_to_parquet([tmp_path / "a.jsonl"], output)
    with pytest.raises(DataError, match=r"none\.txt: no such file"):
        convert_to_parquet([tmp_path / "none.txt"], output)
    (tmp_path / "a.pdf").write_text("")
    with pytest.raises(DataError, match=r"a\.pdf: got \.pdf, expected one of \.txt"):
        convert_to_parquet([tmp_path / "a.pdf"], output)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: no \.txt or \.jsonl file there"):
        convert_to_parquet([tmp_path / "empty"], output)
    (tmp_path / "blocked").write_text("")
    with pytest.raises(DataError, match=r"blocked.*expected readable inputs, and a writable folder"):
        convert_to_parquet([tmp_path / "a.jsonl"], tmp_path / "blocked/out.parquet", text_key="texto")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "a.pdf", "blocked", "empty"]


def test_a_file_that_is_there_is_replaced_only_when_asked(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("uno")
    output = tmp_path / "a.parquet"
    convert_to_parquet([tmp_path / "a.txt"], output)
    (tmp_path / "a.txt").write_text("dos")
    with pytest.raises(DataError, match=r"a\.parquet: exists already"):
        convert_to_parquet([tmp_path / "a.txt"], output)
    assert rows(output) == [("uno", "a.txt")]
    convert_to_parquet([tmp_path / "a.txt"], output, overwrite=True)
    assert rows(output) == [("dos", "a.txt")]
