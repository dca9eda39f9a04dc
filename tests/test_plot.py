"""The curves of a run: what is read from metrics.jsonl, and that it lands in the picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from ultrazoo.errors import DataError
from ultrazoo.plot import plot_run, read_metrics, series


def write(folder: Path, *lines: str | dict[str, object]) -> Path:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    return folder


def record(step: int, loss: float | None) -> dict[str, object]:
    return {"step": step, "loss": loss, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_second": 900.0 + step}


def test_validation_joins_the_record_of_its_step_and_a_repeated_step_counts_once(tmp_path: Path) -> None:
    validation = {"step": 20, "validation_loss": 4.5}
    records = read_metrics(write(tmp_path, record(10, 6.0), record(20, 5.0), validation, record(20, 4.0)))
    assert [entry["step"] for entry in records] == [10, 20]
    assert series(records, "loss") == ([10, 20], [6.0, 4.0])
    assert series(records, "validation_loss") == ([20], [4.5])


def test_a_value_that_was_not_finite_is_left_out(tmp_path: Path) -> None:
    records = read_metrics(write(tmp_path, record(1, 6.0), record(2, None), record(3, 5.0)))
    assert series(records, "loss") == ([1, 3], [6.0, 5.0])


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    assert len(read_metrics(write(tmp_path, record(1, 6.0), '{"step": 2, "lo'))) == 1


def test_a_byte_order_mark_at_the_start_is_skipped(tmp_path: Path) -> None:
    assert len(read_metrics(write(tmp_path, "\ufeff" + json.dumps(record(1, 6.0)), record(2, 5.0)))) == 2


def test_a_damaged_line_in_the_middle_is_an_error_with_its_number(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: got 'oops'"):
        read_metrics(write(tmp_path, record(1, 6.0), "oops", record(2, 5.0)))
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: got .*expected a JSON object with a step"):
        read_metrics(write(tmp_path, record(1, 6.0), {"step": "a"}, record(2, 5.0)))
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: got '\ufffd'"):
        read_metrics(tmp_path)


def test_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected the folder of a run"):
        read_metrics(tmp_path)
    with pytest.raises(DataError, match="no records"):
        read_metrics(write(tmp_path))


def test_the_picture_shows_every_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    validation = {"step": 20, "validation_loss": 4.5, "unigram_entropy": 6.25}
    plot_run(write(tmp_path, record(10, 6.0), record(20, 5.0), validation), tmp_path / "curves.png")
    losses, rate, norm, speed = drawn[0].axes
    curves = {line.get_label(): line.get_ydata() for line in losses.lines}
    assert list(curves["training"]) == [6.0, 5.0]
    assert list(curves["validation"]) == [4.5]
    assert set(curves["unigram entropy of the text"]) == {6.25}
    assert [list(axis.lines[0].get_ydata()) for axis in (rate, norm, speed)] == [[1e-3] * 2, [0.5] * 2, [910.0, 920.0]]


def test_the_file_is_a_png(tmp_path: Path) -> None:
    path = plot_run(write(tmp_path, record(1, 6.0), record(2, 5.0)), tmp_path / "curves.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    height, width = imread(path).shape[:2]
    assert width > 1000 and height > 500


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="choose another --output"):
        plot_run(write(tmp_path, record(1, 6.0)), tmp_path / "missing" / "curves.png")
