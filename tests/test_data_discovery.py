"""Which files a location means: each once, nothing hidden, and what was skipped is listed."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from cli_parts import call
from data_files import build, make_texts, write

from ultrazoo.data.convert import convert_to_parquet
from ultrazoo.data.finding import find_files
from ultrazoo.errors import DataError


def names(location: Path) -> list[str]:
    found = find_files(str(location))
    return [path.relative_to(found.root).as_posix() for path in found.files]


def reasons(location: Path) -> dict[str, str]:
    found = find_files(str(location))
    return {path.relative_to(found.root).as_posix(): reason for path, reason in found.skipped.items()}


def touch(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(path)


def test_suffixes_in_any_case_and_nothing_hidden(tmp_path: Path) -> None:
    touch(tmp_path, "a.parquet", "b.PARQUET", "c.pq", "d.ParQ", "sub.parquet/part-0.snappy.parquet")
    hidden = [".e.parquet", "_f.parquet", ".ipynb_checkpoints/a.parquet", "sub/_temporary/0/a.parquet", "_SUCCESS"]
    touch(tmp_path, *hidden, "notes.txt", "g.parquet.tmp")
    kept = ["a.parquet", "b.PARQUET", "c.pq", "d.ParQ", "sub.parquet/part-0.snappy.parquet"]
    assert names(tmp_path) == kept
    skipped = reasons(tmp_path)
    assert skipped.keys() == {
        ".e.parquet",
        "_f.parquet",
        ".ipynb_checkpoints",
        "sub/_temporary",
        "_SUCCESS",
        "notes.txt",
        "g.parquet.tmp",
    }
    assert skipped["sub/_temporary"] == skipped[".e.parquet"] == "whose name begins with . or _"
    assert skipped["notes.txt"] == "without the suffix .parquet, .parq or .pq"


def test_what_the_location_itself_names_is_read_whatever_its_name(tmp_path: Path) -> None:
    touch(tmp_path, "_mine/.data/a.parquet", "_mine/.data/_b.parquet", "_mine/.data/c.bin")
    assert names(tmp_path / "_mine/.data") == ["a.parquet"]
    assert names(tmp_path / "_mine/.data/_b.parquet") == ["_b.parquet"]
    assert names(tmp_path / "_mine/.data/c.bin") == ["c.bin"]
    assert names(tmp_path / "_mine/.data/*") == ["a.parquet", "c.bin"]
    assert names(tmp_path / "_mine/.data/_*") == ["_b.parquet"]


def test_a_glob_skips_what_is_hidden_and_lists_folders_that_it_does_not_enter(tmp_path: Path) -> None:
    touch(tmp_path, "a.parquet", "_b.parquet", "_temporary/c.parquet", "d.parquet/part-0.parquet", "e/f.parquet")
    assert names(tmp_path / "**/*.parquet") == ["a.parquet", "d.parquet/part-0.parquet", "e/f.parquet"]
    assert reasons(tmp_path / "**/*.parquet").keys() == {"_b.parquet", "_temporary"}
    assert names(tmp_path / "*.parquet") == ["a.parquet"]
    assert reasons(tmp_path / "*.parquet") == {
        "_b.parquet": "whose name begins with . or _",
        "d.parquet": "folder that the glob does not enter",
    }


@pytest.mark.parametrize("pattern", ["", "**/*.parquet"])
def test_each_file_is_read_once_under_the_name_that_is_no_link(tmp_path: Path, pattern: str) -> None:
    touch(tmp_path / "data", "b.parquet", "deep/c.parquet")
    touch(tmp_path, "elsewhere/d.parquet")
    data = tmp_path / "data"
    (data / "a.parquet").symlink_to("b.parquet")
    os.link(data / "b.parquet", data / "z.parquet")
    (data / "again.parquet").symlink_to(tmp_path / "elsewhere/d.parquet")
    (data / "0folder").symlink_to("deep")
    (data / "linked").symlink_to(tmp_path / "elsewhere")
    (data / ".versions").mkdir()
    (data / ".versions/e").write_text("e")
    (data / "e.parquet").symlink_to(".versions/e")
    location = data / pattern if pattern else data
    found = names(location)
    assert len(found) == 4 and {"b.parquet", "deep/c.parquet", "e.parquet"} < {*found}
    assert [name for name in found if name not in ("b.parquet", "deep/c.parquet", "e.parquet")] == ["linked/d.parquet"]
    skipped = reasons(location)
    again = {name for name, reason in skipped.items() if reason == "read already under another name"}
    assert {"a.parquet", "z.parquet", "again.parquet"} <= again and any(name.startswith("0folder") for name in again)


def test_a_link_beside_its_target_adds_no_row_and_changes_no_fingerprint(tmp_path: Path) -> None:
    write(tmp_path / "data/b.parquet", make_texts(60))
    lines: list[str] = []
    before = build(tmp_path, lines)
    assert not any("skipped" in line for line in lines)
    (tmp_path / "data/a.parquet").symlink_to("b.parquet")
    touch(tmp_path / "data", "_SUCCESS", ".a.crc", ".b.crc", ".c.crc", ".d.crc")
    after = build(tmp_path, lines)
    assert (after.fingerprint, after.source.num_rows) == (before.fingerprint, 60)
    assert [line for line in lines if line.startswith("data: skipped")] == [
        "data: skipped 1 read already under another name (a.parquet), 5 whose name begins with . or _ "
        "(.a.crc, .b.crc, .c.crc, ...); ULTRAZOO_LOG=debug lists every entry"
    ]


def test_an_error_names_what_was_skipped_and_the_log_has_every_entry(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path, "_a.parquet", "b.txt")
    with (
        caplog.at_level(logging.DEBUG, "ultrazoo"),
        pytest.raises(DataError, match=r"no Parquet file in it \(skipped: "),
    ):
        find_files(str(tmp_path))
    assert f"data: skipped {tmp_path / 'b.txt'}: without the suffix .parquet, .parq or .pq" in caplog.messages


def texts_of(path: Path) -> list[str]:
    return pq.read_table(path)["text"].to_pylist()


def test_convert_reads_each_file_once_and_lists_what_it_skips(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts"
    touch(texts, "a.txt", "b.JSONL", ".c.txt", "_d/e.txt", "notes.md")
    (texts / "b.JSONL").write_text('{"text": "uno"}\n')
    (texts / "empty.txt").write_text("")
    (texts / "again.txt").symlink_to("a.txt")
    os.link(texts / "a.txt", texts / "hard.txt")
    output = tmp_path / "out.parquet"
    assert call("data", "convert", texts, texts / "a.txt", texts / "../texts/b.JSONL", "--output", output) == 0
    assert texts_of(output) == ["a.txt", "uno"]
    said = capsys.readouterr().err
    assert re.search(r"1 empty \(\S*empty\.txt\)", said)
    assert re.search(r"4 read already under another name", said)
    assert re.search(r"2 whose name begins with \. or _ \(\S*\.c\.txt, \S*_d\)", said)
    assert re.search(r"1 without the suffix \.txt, \.text, \.jsonl or \.ndjson \(\S*notes\.md\)", said)
    touch(tmp_path / "only", "_a.txt")
    with pytest.raises(DataError, match=r"no \.txt or \.jsonl file there \(skipped: 1 whose name begins"):
        convert_to_parquet([tmp_path / "only"], tmp_path / "none.parquet")
    assert convert_to_parquet([tmp_path / "only/_a.txt"], tmp_path / "named.parquet").rows == 1


def test_a_text_file_without_blank_lines_is_one_document_and_said_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "whole.txt").write_text("uno\ndos\ntres\n")
    (tmp_path / "parted.txt").write_text("uno\n\ndos\n")
    (tmp_path / "one.jsonl").write_text('{"text": "uno"}\n')
    assert call("data", "convert", tmp_path, "--output", tmp_path / "out.parquet") == 0
    assert texts_of(tmp_path / "out.parquet") == ["uno", "uno", "dos", "uno\ndos\ntres"]
    [warning] = [line for line in capsys.readouterr().err.splitlines() if "blank line" in line]
    assert warning.startswith(
        f"note: 1 text file(s) without a blank line became one document each ({tmp_path}/whole.txt)"
    )


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf\n\nuno")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "dos"}\r\n{"text": "tres"}\r\n')
    (tmp_path / "c.txt").write_text("cuatro", encoding="utf-16")
    (tmp_path / "d.jsonl").write_text('{"text": "cinco"}', encoding="utf-16")
    result = convert_to_parquet([tmp_path], tmp_path / "out.parquet")
    assert texts_of(tmp_path / "out.parquet") == ["uno", "dos", "tres"]
    assert result.skipped == {"file in UTF-16 or UTF-32; save it as UTF-8": 2}
