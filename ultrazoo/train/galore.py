"""GaLore (arXiv 2403.03507): AdamW whose moments live in a low-rank projection of the gradient.

The projection itself (an SVD of the gradient every few steps) is galore-torch's ``GaLoreProjector``. That package's
``__init__`` needs transformers and bitsandbytes, its projector needs torch alone, so only that one file is loaded.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw

from ultrazoo.config import TrainingConfig
from ultrazoo.errors import ConfigError

MODULE = "ultrazoo_galore_projector"


def load_projector() -> Callable[..., Any]:
    """Return galore-torch's ``GaLoreProjector``.

    Raises:
        ConfigError: The package is not installed.
    """
    package = importlib.util.find_spec("galore_torch")
    folders = list(package.submodule_search_locations or []) if package else []
    files = [Path(folder) / "galore_projector.py" for folder in folders]
    spec = next((importlib.util.spec_from_file_location(MODULE, file) for file in files if file.is_file()), None)
    if spec is None or spec.loader is None:
        raise ConfigError(
            "training.use_galore: got true, but the package galore-torch is not installed; "
            "pip install --no-deps galore-torch (or 'ultrazoo[galore]'), or set it to false"
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    projector: Callable[..., Any] = module.GaLoreProjector
    return projector


def low_rank_names(model: nn.Module, training: TrainingConfig) -> set[str]:
    """Names of the linear weights with min(dim) > 2 x rank and max(dim) <= ``galore_max_dim``.

    A weight that is also an embedding table is left out: its gradient is sparse by rows, not low-rank.

    Raises:
        ConfigError: No weight qualifies.
    """
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    names, shapes = set(), set()
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.weight not in tables and module.weight.requires_grad:
            small, large = sorted(module.weight.shape)
            shapes.add((small, large))
            if small > 2 * training.galore_rank and large <= training.galore_max_dim:
                names.add(f"{prefix}.weight" if prefix else "weight")
    if not names:
        small, large = max(shapes, default=(0, 0))
        raise ConfigError(
            f"training.use_galore: no linear weight has min(dim) > 2 x galore_rank {training.galore_rank} and max(dim) "
            f"<= galore_max_dim {training.galore_max_dim}; the largest is {large} x {small}; "
            "lower galore_rank, raise galore_max_dim, or set use_galore to false"
        )
    return names


def state_shapes(parameter: torch.Tensor, rank: int = 0) -> dict[str, tuple[int, ...]]:
    """Shapes of the state that AdamW keeps of a parameter, or at a rank above 0 of its projected gradient."""
    if not rank:
        return {"step": (), "exp_avg": tuple(parameter.shape), "exp_avg_sq": tuple(parameter.shape)}
    rows, columns = parameter.shape  # of which the rank takes the place of the smaller
    shape, basis = ((rows, rank), (rank, columns)) if rows >= columns else ((rank, columns), (rows, rank))
    return {"step": (), "basis": basis, "exp_avg": shape, "exp_avg_sq": shape}


class GaLoreAdamW(torch.optim.Optimizer):
    """W -= lr * scale * P N, with N the Adam direction of the projected gradient P^T G; plain AdamW elsewhere.

    The state of a projected weight is plain tensors: ``step``, ``basis`` (r, n) or (m, r), ``exp_avg`` and
    ``exp_avg_sq`` of the projected gradient's shape.

    Args:
        plain: Parameter groups of AdamW.
        projected: Weights of shape (m, n) to project.
        rank: Rank r of the projection.
        update_interval: Steps between new bases; 1 means an SVD at every step.
        scale: Factor on the projected-back direction.
        lr: Learning rate.
        betas: Decays of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay of the projected weights.
        fused: Run the plain groups as one kernel.
        projector: Class to project with; unset: galore-torch's.
    """

    def __init__(
        self,
        plain: Iterable[dict[str, Any]],
        projected: list[nn.Parameter],
        *,
        rank: int,
        update_interval: int,
        scale: float,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        fused: bool,
        projector: Callable[..., Any] | None = None,
    ) -> None:
        self._projector = projector or load_projector()
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"rank": 0, "update_interval": update_interval, "scale": scale, "fused": fused}
        super().__init__([*plain, {"params": projected, "rank": rank, "fused": False}], defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            if group["rank"]:
                self._step_projected(group, parameters)
            else:
                gradients = [parameter.grad for parameter in parameters]
                self._adam(group, parameters, parameters, gradients, group["lr"], group["weight_decay"])

    def _step_projected(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        projectors, gradients = [], []
        for parameter in parameters:
            state = self.state[parameter]
            projector = self._projector(
                group["rank"], update_proj_gap=group["update_interval"], scale=group["scale"], proj_type="std"
            )
            projector.ortho_matrix = state.get("basis")
            done = int(state["step"]) if "step" in state else 0
            gradients.append(projector.project(parameter.grad, done))
            state["basis"] = projector.ortho_matrix.contiguous()
            projectors.append(projector)
        # a step of AdamW from zero is the direction itself: -lr N
        directions = [torch.zeros_like(gradient) for gradient in gradients]
        self._adam(group, parameters, directions, gradients, group["lr"], 0.0)
        weights: list[torch.Tensor] = list(parameters)
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, [p.project_back(d) for p, d in zip(projectors, directions, strict=True)])

    def _adam(
        self,
        group: dict[str, Any],
        owners: list[nn.Parameter],
        targets: list[Any],
        gradients: list[Any],
        lr: float,
        weight_decay: float,
    ) -> None:
        """Move ``targets`` by AdamW on ``gradients``, with the moments kept under ``owners``."""
        for owner, gradient in zip(owners, gradients, strict=True):
            state = self.state[owner]
            if "step" not in state:
                state["step"] = torch.zeros((), device=owner.device if group["fused"] else "cpu")
                state["exp_avg"] = torch.zeros_like(gradient)
                state["exp_avg_sq"] = torch.zeros_like(gradient)
        states = [self.state[owner] for owner in owners]
        adamw(
            targets,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=group["fused"],
            foreach=not group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=lr,
            weight_decay=weight_decay,
            eps=group["eps"],
            maximize=False,
        )
