"""Parameter groups, and GaLore's step against its equation."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ultrazoo.config import TrainingConfig, load_config
from ultrazoo.errors import CheckpointError, ConfigError
from ultrazoo.model import build_model
from ultrazoo.train import galore
from ultrazoo.train.checkpoint import OPTIMIZER, load_optimizer, optimizer_tensors
from ultrazoo.train.optim import build_optimizer, skips_on_device, split_parameters


class Odd(nn.Module):
    """One parameter of every kind that the groups tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(10, 6)
        self.conv = nn.Conv1d(6, 6, 3, groups=6)
        self.linear = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.tokens.weight
        self.experts = nn.Parameter(torch.randn(2, 6, 6))
        self.gain = nn.Parameter(torch.ones(6))
        self.a_log = nn.Parameter(torch.randn(6, 4))
        self.a_log._no_weight_decay = True  # type: ignore[attr-defined]
        self.frozen = nn.Parameter(torch.randn(6, 6), requires_grad=False)


def test_matrices_decay_and_norms_biases_vectors_and_flagged_tensors_do_not() -> None:
    groups = split_parameters(Odd())
    assert set(groups.decayed) == {"tokens.weight", "conv.weight", "linear.weight", "experts"}
    assert set(groups.kept) == {"conv.bias", "linear.bias", "norm.weight", "norm.bias", "gain", "a_log"}
    assert groups.reasons == {"biases": 12, "norms": 12, "scalars and vectors": 6, "flagged": 24}


def test_only_the_decayed_group_shrinks_without_a_gradient() -> None:
    model = Odd()
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer, summary = build_optimizer(model, TrainingConfig(weight_decay=0.5, learning_rate=0.1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, value in model.named_parameters():
        factor = 0.95 if name in split_parameters(model).decayed else 1.0
        torch.testing.assert_close(value, before[name] * factor, msg=name)
    assert summary == (
        "adamw: 186 parameters decay by 0.5; without decay: scalars and vectors 6, flagged 24, biases 12, norms 12"
    )


def test_adamw_is_fused_and_found_inf_keeps_the_weights() -> None:
    model = nn.Linear(3, 3)
    optimizer, _ = build_optimizer(model, TrainingConfig())
    assert skips_on_device(optimizer)
    before = model.weight.clone()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    optimizer.step()
    assert torch.equal(model.weight, before)
    assert all(bool(torch.isfinite(value).all()) for state in optimizer.state.values() for value in state.values())


class Projector:
    """The projector's interface with a fixed basis: the first coordinates."""

    def __init__(self, rank: int, update_proj_gap: int, scale: float, proj_type: str) -> None:
        self.rank, self.gap, self.scale, self.ortho_matrix = rank, update_proj_gap, scale, None
        assert proj_type == "std"

    def project(self, gradient: torch.Tensor, step: int) -> torch.Tensor:
        tall = gradient.shape[0] >= gradient.shape[1]
        if self.ortho_matrix is None or step % self.gap == 0:
            eye = torch.eye(min(gradient.shape))[: self.rank]
            self.ortho_matrix = eye if tall else eye.T
        return gradient @ self.ortho_matrix.T if tall else self.ortho_matrix.T @ gradient

    def project_back(self, low: torch.Tensor) -> torch.Tensor:
        return self.scale * (low @ self.ortho_matrix if low.shape[0] >= low.shape[1] else self.ortho_matrix @ low)


@pytest.mark.parametrize("shape", [(12, 9), (9, 12)])
def test_galore_is_adam_in_the_projected_space(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(shape))
    expected, lr, scale, decay, betas, eps = weight.detach().clone(), 0.1, 0.25, 0.2, (0.9, 0.98), 1e-8
    optimizer = galore.GaLoreAdamW(
        [], [weight], rank=3, update_interval=2, scale=scale, lr=lr, betas=betas, eps=eps, weight_decay=decay,
        fused=False, projector=Projector,
    )  # fmt: skip
    basis = torch.eye(9)[:3]
    first = second = torch.zeros(())
    for count in range(1, 6):
        gradient = torch.randn(shape)
        weight.grad = gradient
        optimizer.step()
        low = gradient @ basis.T if shape[0] > shape[1] else basis @ gradient
        first = betas[0] * first + (1 - betas[0]) * low
        second = betas[1] * second + (1 - betas[1]) * low**2
        direction = (first / (1 - betas[0] ** count)) / ((second / (1 - betas[1] ** count)).sqrt() + eps)
        back = direction @ basis if shape[0] > shape[1] else basis.T @ direction
        expected = expected * (1 - lr * decay) - lr * scale * back
        torch.testing.assert_close(weight.detach(), expected)
    low_rank = (12, 3) if shape[0] > shape[1] else (3, 12)
    basis_shape = (3, 9) if shape[0] > shape[1] else (9, 3)
    shapes = {"basis": basis_shape, "step": (), "exp_avg": low_rank, "exp_avg_sq": low_rank}
    assert {name: tuple(value.shape) for name, value in optimizer.state[weight].items()} == shapes
    assert galore.state_shapes(weight, 3) == shapes


def test_galore_takes_linear_weights_that_are_large_enough_and_says_when_none_is() -> None:
    model = nn.ModuleDict({
        "wide": nn.Linear(40, 20), "narrow": nn.Linear(40, 16), "long": nn.Linear(80, 20),
        "table": nn.Embedding(40, 20), "conv": nn.Conv1d(40, 20, 1),
    })  # fmt: skip
    model["tied"] = nn.Linear(20, 40)
    model["tied"].weight = model["table"].weight
    training = TrainingConfig(use_galore=True, galore_rank=8, galore_max_dim=64)
    assert galore.low_rank_names(model, training) == {"wide.weight"}
    with pytest.raises(ConfigError, match=r"use_galore: no linear weight has min\(dim\) > 2 x galore_rank 64"):
        galore.low_rank_names(model, training.model_copy(update={"galore_rank": 64}))


@pytest.mark.parametrize("saved", [0, 3, 4], ids="rank {}".format)
@pytest.mark.parametrize("wanted", [0, 3], ids="into rank {}".format)
def test_state_of_another_shape_is_refused_before_it_reaches_the_fused_update(
    saved: int, wanted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(galore, "load_projector", lambda: Projector)

    def build(rank: int) -> tuple[nn.Module, torch.optim.Optimizer, dict[torch.Tensor, str]]:
        model = nn.Linear(12, 10)
        settings = {"use_galore": True, "galore_rank": rank} if rank else {}
        names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        return model, build_optimizer(model, TrainingConfig(**settings))[0], names

    model, optimizer, names = build(saved)
    model(torch.ones(2, 12)).sum().backward()
    optimizer.step()
    save_file(optimizer_tensors(optimizer, names), tmp_path / OPTIMIZER)
    model, optimizer, names = build(wanted)
    if saved == wanted:
        load_optimizer(tmp_path, optimizer, names)
        assert len(optimizer.state) == 2
        return
    with pytest.raises(CheckpointError, match=r"of weight, expected .*exp_avg \(.*galore_rank.*--weights-only"):
        load_optimizer(tmp_path, optimizer, names)
    assert not optimizer.state


def test_galore_without_its_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install --no-deps galore-torch"):
        build_optimizer(nn.Linear(40, 20), TrainingConfig(use_galore=True, galore_rank=4))


@pytest.mark.optional
@pytest.mark.skipif(importlib.util.find_spec("galore_torch") is None, reason="galore-torch is not installed")
def test_galore_torchs_projector_shrinks_the_state_and_the_loss() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    training = TrainingConfig(
        use_galore=True, galore_rank=8, galore_update_interval=10, galore_scale=1.0, learning_rate=2e-2
    )
    optimizer, summary = build_optimizer(model, training)
    x, y = torch.randn(256, 64), torch.randn(256, 4) @ torch.randn(4, 64)
    losses = []
    for _ in range(120):
        loss = (model(x) - y).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
    state: dict[str, Any] = optimizer.state[model[0].weight]
    assert sum(value.numel() for value in state.values()) == 8 * 64 * 3 + 1  # AdamW keeps 2 x 64 x 64
    assert "8,192 of them in 2 matrices at rank 8" in summary


@pytest.mark.parametrize("preset", ["mini", "frankenstein", "standard", "embbert"])
def test_the_config_reference_lists_what_is_excluded_from_weight_decay(preset: str) -> None:
    small = {"hidden_size": 32, "num_heads": 2, "vocab_size": 100, "ffn_hidden_size": 32, "num_layers": 6}
    small |= {"retention_heads": 2} if preset in ("mini", "frankenstein") else {}
    small |= {"factorized_embedding_dim": 16} if preset in ("mini", "embbert") else {}
    model = build_model(load_config(preset, [f"model.{name}={value}" for name, value in small.items()]).config.model)
    reference = (Path(__file__).parents[1] / "configs/README.md").read_text()
    section = reference.split("### What is excluded from weight decay")[1].split("\n## ")[0]
    listed = set(re.findall(r"`([\w.]+)`", section))
    for name in split_parameters(model).kept:
        parts = name.split(".")
        assert parts[-1] in listed or ".".join(parts[-2:]) in listed, name
