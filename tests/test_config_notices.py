"""Settings without effect are notices: the config loads, and the model is the one without them."""

from __future__ import annotations

import pytest
import torch
from cli_parts import call
from config_parts import SMALL, write

from ultrazoo.config import ModelConfig, load_config
from ultrazoo.model import build_model
from ultrazoo.options import Options
from ultrazoo.plugins import Plugin
from ultrazoo.registry import Registry, registry
from ultrazoo.spec import BlockSpec


def test_values_without_effect_are_told_by_name(tmp_path):
    training = "training: {galore_rank: 8, num_epochs: 2, max_steps: 5}\n"
    text = "model: {ode_steps: 4, hope_base: 500, num_experts: 8}\n" + training
    notices = "\n".join(load_config(write(tmp_path, text)).notices)
    for field in (
        "model.ode_steps",
        "model.hope_base",
        "model.num_experts",
        "training.galore_rank",
        "training.num_epochs",
    ):
        assert field in notices
    assert "model.ode_steps: has no effect without one of: ode" in notices
    assert load_config(write(tmp_path, SMALL)).notices == []


@pytest.mark.parametrize(
    ("fields", "notice"),
    [
        ({"use_hope": True}, "model.use_hope: has no effect: no block of layer_pattern ['standard_attn'] reads it"),
        (
            {"use_bitnet": True, "ffn_type": "none", "layer_pattern": ["plain"]},
            "model.use_bitnet: has no effect: no block of layer_pattern ['plain'] reads it, only: ",
        ),
        ({"use_embedding_conv": True}, "model.use_embedding_conv: has no effect while use_factorized_embedding is"),
        (
            {"position_embedding": "rope", "layer_pattern": ["mamba"]},
            "model.position_embedding: 'rope' has no effect: no block of layer_pattern ['mamba'] rotates",
        ),
        ({"block_options": {"mamba": {"d_state": 8}}}, "model.block_options.mamba: has no effect: no layer uses"),
    ],
)
def test_a_setting_without_effect_is_a_notice_and_changes_no_parameter(monkeypatch, fields, notice):
    plain = BlockSpec(name="plain", kind="mixer", module=Plain, config=Options, paper="", equation="y = x")
    zoo = Registry([*registry().plugins, Plugin(name="p", distribution="p", version="1", module="p", blocks=(plain,))])
    for module in ("ultrazoo.model", "ultrazoo.config.model"):
        monkeypatch.setattr(f"{module}.registry", lambda: zoo)
    small = {"hidden_size": 48, "vocab_size": 100, "num_layers": 1, "num_heads": 4}
    idle = ModelConfig.model_validate(small | fields)
    assert [line for line in idle.notices() if line.startswith(notice)], idle.notices()
    setting = next(iter(fields))
    default = ModelConfig.model_fields[setting].get_default(call_default_factory=True)
    off = ModelConfig.model_validate(small | fields | {setting: default})
    assert [name for name, _ in build_model(idle).named_parameters()] == [
        name for name, _ in build_model(off).named_parameters()
    ]
    assert not any(line.startswith(notice) for line in off.notices())


class Plain(torch.nn.Identity):
    def forward(self, x, segments=None):
        return x


REFERENCE_SAMPLE = """\
model_class: MODEL_CLASS
model:
  vocab_size: 50000
  hidden_size: 768
  num_layers: 12
  num_loops: 1
  num_heads: 12
  retention_heads: 12
  num_experts: 4
  top_k_experts: 2
  dropout: 0.1
  layer_pattern: [standard_attn]
  ode_solver: rk4
  ode_steps: 2
  use_bitnet: false
  norm_type: NORM
  use_factorized_embedding: false
  factorized_embedding_dim: 128
  use_embedding_conv: false
  embedding_conv_kernel: 3
  hope_base: 10000.0
  hope_damping: 0.01
  use_hope: true
  use_moe: true
  ffn_hidden_size: 3072
  ffn_activation: ACTIVATION
training:
  batch_size: 4
  dataloader_workers: 2
  max_length: 512
  mlm_probability: 0.15
  max_samples: 20000000
  dataset_batch_size: 25000
  num_workers: 8
  cache_dir: "./temp_data/v2_dataset_cache"
  local_parquet_dir: "/path/to/parquet"
  prefer_local_cache: true
  stream_local_parquet: true
  use_amp: false
  gradient_accumulation_steps: 4
  checkpoint_every_n_steps: 500
  max_rolling_checkpoints: 3
  num_best_checkpoints: 2
  nan_check_interval: 10
  log_gradient_stats: true
  gradient_log_interval: 10
  use_galore: false
  galore_rank: 64
  galore_update_interval: 1
  galore_scale: 1.0
  galore_max_dim: 4096
"""
"""The sample of the original project's config reference, with its three choices open."""


@pytest.mark.parametrize("model_class", ["frankenstein", "mini"])
@pytest.mark.parametrize("norm", ["layer_norm", "dynamic_tanh", "derf"])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_the_sample_of_the_config_reference_loads(tmp_path, capsys, model_class, norm, activation):
    text = REFERENCE_SAMPLE
    for name, value in {"MODEL_CLASS": model_class, "NORM": norm, "ACTIVATION": activation}.items():
        text = text.replace(name, value)
    path = write(tmp_path, text)
    assert call("train", str(path), "--print-config") == 0
    printed = capsys.readouterr()
    assert "note: model.use_hope: has no effect" in printed.err
    resolved = load_config(write(tmp_path, printed.out)).config.model
    assert (resolved.norm_type, resolved.ffn_activation, resolved.use_hope) == (norm, activation, True)
    assert resolved.use_factorized_embedding == (model_class == "mini")


@pytest.mark.parametrize("mixer", sorted(registry().mixers()))
@pytest.mark.parametrize("preset", sorted(registry().presets()))
def test_every_preset_runs_with_every_mixer(preset, mixer):
    config = load_config(preset, [f"model.layer_pattern=[{mixer}]", "model.retention_heads=4"]).config
    with torch.device("meta"):
        assert {layer.mixer_name for layer in build_model(config.model).layers} == {mixer}
