"""A flight record holds the first bad step itself, and a replay of it names where the NaN arose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_parts import call
from safetensors.torch import load_file
from torch import nn
from train_parts import VOCAB, TinyModel, make_config, make_trainer, rows

from ultrazoo.config import Config, config_from_dict
from ultrazoo.errors import CheckpointError, ConfigError, NonFiniteError, UltrazooError
from ultrazoo.model import build_model
from ultrazoo.ops.library import kernel_policy
from ultrazoo.train.flight import KEPT, read_flight
from ultrazoo.train.replay import replay
from ultrazoo.train.signals import SignalGuard

Capture = pytest.CaptureFixture[str]
CPU = torch.device("cpu")


def config(mixer: str = "standard_attn", **training: Any) -> Config:
    model = {"vocab_size": VOCAB, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "retention_heads": 2}
    model |= {"ffn_hidden_size": 16, "layer_pattern": [mixer], "num_loops": 2, "dropout": 0.2}
    settings = {"batch_size": 3, "max_steps": 6, "device": "cpu", "num_threads": 1, "learning_rate": 1e-3}
    return config_from_dict({"model": model, "training": settings | training}, "test")


def overflowing(config: Config) -> nn.Module:
    """A model that overflows float32 in its second layer, and would not overflow float64."""
    torch.manual_seed(0)
    model = build_model(config.model)
    with torch.no_grad():
        model.layers[0].ffn.up.weight.mul_(1e30)
    return model


def crash(folder: Path, config: Config, model: nn.Module) -> Path:
    """Train until it stops for a NaN; return the flight record that the error names."""
    trainer, _ = make_trainer(folder, config, model=model)
    with pytest.raises(NonFiniteError) as caught, SignalGuard() as guard:
        trainer.run(guard)
    [record] = (folder / "flight").iterdir()
    assert f"ultrazoo replay {record})" in str(caught.value)
    return record


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = config(gradient_accumulation_steps=2, nan_check_interval=2)
    with kernel_policy("reference"):
        return crash(tmp_path_factory.mktemp("run"), settings, overflowing(settings))


def test_the_record_is_of_the_first_bad_step_though_it_was_found_later(tmp_path: Path) -> None:
    model = TinyModel(dropout=0.2)
    quiet = make_config(nan_check_interval=5, checkpoint_every_n_steps=50, eval_every_n_steps=50)
    trainer, _ = make_trainer(tmp_path, quiet, model=model)
    model.poisonous_rows = {9, 17}  # rows 8 to 11 are those of step 3
    before: dict[str, torch.Tensor] = {}

    def remember(*_: Any) -> None:
        if trainer.progress.step == 3 and not before:
            before.update({name: value.clone() for name, value in model.state_dict().items()})

    model.register_forward_pre_hook(remember)
    with pytest.raises(NonFiniteError, match=r"step 3: loss nan, gradient norm nan \(found at the check of step 5\)"):
        trainer.run(SignalGuard())
    folder = tmp_path / "flight" / "step-000003"
    names = {"batch.safetensors", "model.safetensors", "record.json", "config.yaml", "manifest.json"}
    assert {path.name for path in folder.iterdir()} == names
    flight = read_flight(folder)
    expected = rows(8, 4)
    for name in ("input_ids", "segments", "labels"):
        assert torch.equal(flight.batches[0][name], getattr(expected, name))
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(tensor, before[name]), name
    found = flight.record
    assert (found["step"], found["found_at"], found["bad"], found["loss"]) == (3, 5, 2, "nan")
    assert found["repeated"]["loss"] == "nan"
    assert found["environment"]["torch"] == torch.__version__
    assert (
        set(found["gradients"])
        == set(found["weights"])
        == {"embeddings", "layers.0.0", "norm", "head"} - {"head"} | {"head"}
    )
    assert found["activations"]["norm"]["not_finite"] == "0"
    json.loads((folder / "record.json").read_text(), parse_constant=pytest.fail)


def test_a_replay_comes_to_the_same_and_names_module_and_operator(record: Path) -> None:
    done = replay(record)
    assert (done.step, done.loss, done.explained) == (1, "nan", True)
    assert done.seen.origin is not None
    assert (done.seen.origin.module, done.seen.origin.op) == ("layers.1.mixer_norm", "aten::native_layer_norm")
    assert done.seen.origin.largest_input > 1e20
    assert str(done.seen.origin) == json.loads((record / "record.json").read_text())["repeated"]["origin"]
    assert done.seen.way[-1].module == "objective"
    assert done.verdict.endswith("reproduced")


def test_another_dtype_that_avoids_the_fault_says_what_it_comes_with(record: Path) -> None:
    done = replay(record, dtype="float64")
    assert done.seen.finite
    assert done.verdict.startswith("finite (reference kernels, float64, cpu): loss 3.")
    assert done.verdict.endswith("so the fault comes with float32")
    with pytest.raises(ConfigError, match=r"got '', expected one of auto, cpu, cuda, cuda:N, mps"):
        replay(record, device="")
    again = replay(record, dtype="bfloat16", kernels="auto")
    assert "dtype make no difference" in again.verdict


def test_the_command_prints_a_table_or_json(record: Path, capsys: Capture) -> None:
    assert call("replay", record) == 0
    out, err = capsys.readouterr()
    for words in ("layers.1.mixer_norm", "aten::native_layer_norm", "From its origin", "layers.0.ffn", "gradient norm"):
        assert words in out
    assert "first NaN: layers.1.mixer_norm, aten::native_layer_norm, forward" in err
    assert call("replay", record, "--dtype", "float64", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["finite"], data["origin"], data["recorded"]["loss"]) == (True, None, "nan")
    assert call("replay", record, "--json") == 0
    assert json.loads(capsys.readouterr().out)["origin"]["module"] == "layers.1.mixer_norm"
    assert call("replay", record, "--dtype", "int8") == 2
    assert call("replay", record.parent) == 1
    assert "holds no flight record" in capsys.readouterr().err


@pytest.mark.parametrize("mixer", ["retnet", "mamba"])
def test_a_fault_that_is_not_in_the_record_is_not_reproduced(tmp_path: Path, mixer: str, capsys: Capture) -> None:
    settings = config(mixer)
    model = build_model(settings.model)

    def flip(module: nn.Module, inputs: Any, output: Any) -> Any:  # a machine that computes wrong
        return output * torch.inf

    model.layers[1].mixer.register_forward_hook(flip)
    folder = crash(tmp_path, settings, model)
    assert call("replay", folder) == 1
    assert "not reproduced" in capsys.readouterr().err
    [kernel] = read_flight(folder).record["kernels"]
    assert kernel["op"] in ("ultrazoo::retention", "ultrazoo::selective_scan")
    assert call("replay", folder, "--kernels", "reference") == (0 if kernel["compiled"] else 1)
    assert ("so the fault comes with compiled kernels" in capsys.readouterr().err) == kernel["compiled"]


def test_a_damaged_or_missing_record_is_refused(record: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in record.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "batch.safetensors").write_bytes((record / "batch.safetensors").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"damaged: batch\.safetensors has"):
        replay(copy)
    with pytest.raises(UltrazooError, match="holds no flight record"):
        replay(tmp_path)
    with pytest.raises(ConfigError, match="--kernels: got 'fast'"):
        replay(record, kernels="fast")


def test_at_most_a_few_records_are_kept(tmp_path: Path) -> None:
    trainer, _ = make_trainer(tmp_path, make_config(on_nan="skip", max_steps=20), model=TinyModel(0))
    model = trainer.model
    assert isinstance(model, TinyModel)
    model.poisonous_rows = {4 * step for step in range(0, 20, 2)}
    trainer.run(SignalGuard())
    assert trainer.progress.skipped_steps == 10
    kept = sorted(path.name for path in (tmp_path / "flight").iterdir())
    assert kept == ["step-000001", "step-000003", "step-000005"]
    assert len(kept) == KEPT
