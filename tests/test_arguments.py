"""Public functions name the argument that they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ultrazoo.arguments import file_path, list_of, whole_number
from ultrazoo.config import Config, load_config
from ultrazoo.data.convert import convert_to_parquet
from ultrazoo.errors import ArgumentError, ArgumentTypeError
from ultrazoo.inference import find_checkpoint, load
from ultrazoo.nn.bitlinear import pack
from ultrazoo.plot import plot_run, read_metrics
from ultrazoo.testing import conformance_tests
from ultrazoo.train import train
from ultrazoo.train.inspection import inspect_path
from ultrazoo.train.replay import replay
from ultrazoo.train.verify import verify_run

PATHS: dict[str, Callable[[Any], Any]] = {
    "path of load": load,
    "path of find_checkpoint": find_checkpoint,
    "path of inspect_path": inspect_path,
    "run_dir of read_metrics": read_metrics,
    "run_dir of plot_run": lambda path: plot_run(path, "out.png"),
    "output of plot_run": lambda path: plot_run("run", path),
    "run_dir of train": lambda path: train(Config(), run_dir=path),
    "run_dir of verify_run": verify_run,
    "folder of replay": replay,
    "source of load_config": load_config,
    "output of convert_to_parquet": lambda path: convert_to_parquet([], path),
    "inputs[0] of convert_to_parquet": lambda path: convert_to_parquet([path], "out.parquet"),
}


@pytest.mark.parametrize("case", PATHS)
def test_a_path_is_a_str_or_a_path(case: str) -> None:
    name = case.partition(" ")[0].replace("[", r"\[").replace("]", r"\]")
    for value in (None, 3, b"run", ["run"], True):
        with pytest.raises(ArgumentTypeError, match=rf"^{name}: got .*expected a path"):
            PATHS[case](value)
    for value in ("", "  ", "a\0b"):
        with pytest.raises(ArgumentError, match=rf"^{name}: got .*expected a path"):
            PATHS[case](value)


def test_one_str_is_no_list_of_its_characters(tmp_path: Path) -> None:
    file = tmp_path / "file.txt"
    file.write_text("text")
    for one in (str(file), file):
        with pytest.raises(ArgumentTypeError, match=r"^inputs: got one .*file\.txt.*expected a list of paths"):
            convert_to_parquet(one, tmp_path / "out.parquet")
    with pytest.raises(TypeError, match=r"^overrides: got one str, 'training\.seed=1', expected a list of overrides"):
        load_config("embbert", "training.seed=1")
    with pytest.raises(ArgumentTypeError, match=r"^text_key: got None"):
        convert_to_parquet([file], tmp_path / "out.parquet", text_key=None)
    assert convert_to_parquet(iter([file]), str(tmp_path / "out.parquet")).rows == 1


def test_other_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"^steps: got 0, expected at least 1"):
        verify_run(tmp_path, steps=0)
    with pytest.raises(ArgumentTypeError, match=r"^model: got dict, expected a torch\.nn\.Module"):
        pack({})
    with pytest.raises(ArgumentTypeError, match=r"^target: got None, expected the name"):
        conformance_tests(None)


def test_values_within_bounds_come_back() -> None:
    assert whole_number("n", np.int32(3), least=1, most=3) == 3
    with pytest.raises(ArgumentError, match="n: got 4, expected 1 to 3"):
        whole_number("n", 4, least=1, most=3)
    assert file_path("p", "runs/a") == Path("runs/a") == file_path("p", Path("runs/a"))
    assert list_of("v", (1, 2), "numbers") == [1, 2] == list_of("v", iter([1, 2]), "numbers")
    assert issubclass(ArgumentTypeError, TypeError) and issubclass(ArgumentError, ValueError)
