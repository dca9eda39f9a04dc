"""A checkpoint is whole or absent, is checked before it is read, and the right ones are kept."""

from __future__ import annotations

import json
import pickle
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from train_parts import TinyModel

from ultrazoo.errors import CheckpointError
from ultrazoo.train import checkpoint
from ultrazoo.train.checkpoint import Snapshot, load_model, load_optimizer, model_tensors, optimizer_tensors
from ultrazoo.train.store import CheckpointStore


def snapshot(step: int, loss: float | None = None, size: int = 4) -> Snapshot:
    return Snapshot(
        model={"weight": torch.full((size,), float(step))},
        optimizer={"weight/exp_avg": torch.zeros(size)},
        state={"step": step, "validation_loss": loss},
        config_yaml="model_class: mini\n",
        tokenizer_json="{}\n",
    )


def fill(root: Path, losses: list[float | None], rolling: int, best: int) -> CheckpointStore:
    """Save steps 1, 2, ... with these losses, each through a store that knows nothing but the folder."""
    for step, loss in enumerate(losses, 1):
        CheckpointStore(root, rolling, best).save(step, snapshot(step, loss))
    return CheckpointStore(root, rolling, best)


def steps(store: CheckpointStore) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in store.complete()]


@pytest.mark.parametrize(
    ("rolling", "best", "kept"),
    [(2, 1, [2, 5, 6]), (1, 2, [2, 4, 6]), (0, 1, [2, 6]), (3, 0, [4, 5, 6]), (0, 0, [6])],
)
def test_rolling_and_best_hold_across_restarts(tmp_path: Path, rolling: int, best: int, kept: list[int]) -> None:
    store = fill(tmp_path, [5.0, 1.0, None, 2.0, 4.0, 3.0], rolling, best)
    assert steps(store) == kept
    assert (tmp_path / "latest").read_text() == "step-000006\n"
    assert (tmp_path / "best").exists() == (best > 0)
    if best:
        assert (tmp_path / "best").read_text() == "step-000002\n"
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_steps_are_ordered_as_numbers_and_would_be_best_asks_for_a_lower_loss(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 5, 2)
    for step, loss in ((999_999, 2.0), (1_000_000, 3.0), (20, None)):
        store.save(step, snapshot(step, loss))
    assert steps(store) == [20, 999_999, 1_000_000]
    assert (store.would_be_best(2.9), store.would_be_best(3.0), store.would_be_best(float("nan"))) == (
        True,
        False,
        False,
    )
    assert not CheckpointStore(tmp_path, 5, 0).would_be_best(0.0)


def damage_cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def damage_flip(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(bytes(data))


def damage_missing(folder: Path) -> None:
    (folder / "optimizer.safetensors").unlink()


def damage_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format_version": 1')


def damage_version(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))


def damage_no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def damage_no_entry(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["model.safetensors"] = {"bytes": 3}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "damage", [damage_cut, damage_flip, damage_missing, damage_manifest, damage_no_manifest, damage_no_entry]
)
def test_a_damaged_newest_is_set_aside_with_a_warning(tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    store = fill(tmp_path, [None, None], 3, 1)
    damage(tmp_path / "step-000002")
    lines: list[str] = []
    assert store.newest_whole(lines.append) == tmp_path / "step-000001"
    assert len(lines) == 1
    assert "warning" in lines[0]
    assert "step-000002.damaged" in lines[0]
    assert (tmp_path / "step-000002.damaged").is_dir()
    store.save(2, snapshot(2))
    assert steps(store) == [1, 2]


def test_a_newest_of_another_format_version_is_refused_and_left_where_it_is(tmp_path: Path) -> None:
    store = fill(tmp_path, [None, None], 3, 1)
    damage_version(tmp_path / "step-000002")
    with pytest.raises(CheckpointError, match="got format_version 99, expected 1"):
        store.newest_whole(print)
    assert steps(store) == [1, 2]


def test_when_all_are_damaged_the_run_does_not_start_anew_by_itself(tmp_path: Path) -> None:
    store = fill(tmp_path, [None], 3, 1)
    damage_cut(tmp_path / "step-000001")
    with pytest.raises(CheckpointError, match="no whole checkpoint is left"):
        store.newest_whole(lambda line: None)
    assert CheckpointStore(tmp_path / "none", 1, 1).newest_whole(lambda line: None) is None


def test_a_full_disk_leaves_the_old_checkpoint_and_no_temporary(tmp_path: Path) -> None:
    store = fill(tmp_path, [1.0], 1, 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(
            CheckpointError, match=r"step-000002: cannot be written: .*the earlier checkpoints are intact"
        ):
            store.save(2, snapshot(2, size=1_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000001"]
    checkpoint.verify_checkpoint(tmp_path / "step-000001")


def test_what_a_kill_leaves_behind_is_ignored_then_removed(tmp_path: Path) -> None:
    store = fill(tmp_path, [None, None], 3, 1)
    (tmp_path / "step-000002").rename(tmp_path / ".step-000002.deleting")
    unfinished = tmp_path / ".step-000003.tmp-77"
    unfinished.mkdir()
    (unfinished / "model.safetensors").write_bytes(b"half")
    (tmp_path / "latest").write_text("step-000002\n")
    (tmp_path / ".latest.tmp-77").write_text("st")
    assert store.newest_whole(print) == tmp_path / "step-000001"
    store.tidy()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000001"]
    assert (tmp_path / "latest").read_text() == "step-000001\n"


def test_a_shared_tensor_is_saved_once_and_comes_back_in_both_places(tmp_path: Path) -> None:
    model = TinyModel()
    names = {parameter: name for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    state = Snapshot(
        model=model_tensors(model), optimizer=optimizer_tensors(optimizer, names), state={}, config_yaml="a: 1\n",
        tokenizer_json="{}",
    )  # fmt: skip
    folder = tmp_path / "step-000001"
    checkpoint.write_checkpoint(folder, state)
    assert "embeddings.weight" in (saved := load_file(folder / "model.safetensors"))
    assert "head.weight" not in saved
    other = TinyModel()
    again = torch.optim.AdamW(other.parameters(), fused=True)
    load_model(folder, other)
    load_optimizer(folder, again, {parameter: name for name, parameter in other.named_parameters()})
    assert torch.equal(other.head.weight, model.head.weight)
    assert other.head.weight is other.embeddings.weight
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)
        assert all(torch.equal(value, again.state[right][key]) for key, value in optimizer.state[left].items())


def test_another_shape_is_refused_with_every_difference(tmp_path: Path) -> None:
    folder = tmp_path / "step-000001"
    checkpoint.write_checkpoint(folder, snapshot(1))
    model = nn.Module()
    model.register_buffer("weight", torch.zeros(5))
    model.register_buffer("extra", torch.zeros(1))
    with pytest.raises(CheckpointError) as caught:
        load_model(folder, model)
    assert "weight: got (4,) float32, expected (5,) float32" in str(caught.value)
    assert "extra: in the model, not in the file" in str(caught.value)


def test_a_pickle_is_refused_and_never_run(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "harm",))  # type: ignore[return-value]

    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps(Harm()))
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.read_tensors(path)
    assert not (tmp_path / "harm").exists()
