"""Holds whole tiny models to themselves: compiled kernels against references, in one step and over a training run."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ultrazoo.config import ModelConfig
from ultrazoo.model import IGNORED, MaskedLM, build_model
from ultrazoo.ops.library import Policy, kernel_policy, kernel_status
from ultrazoo.spec import BlockSpec
from ultrazoo.testing.parity import FORWARD_FACTOR, GRADIENT_FACTOR, Check, floor_of, relative_error

VOCABULARY, ROWS, LENGTH = 64, 4, 72
STEPS = 50
DOCUMENTS = (30, 1, 33)
"""Lengths of the documents of each row; the rest is padding."""


def check_block(spec: BlockSpec, device: torch.device) -> Iterator[Check]:
    """Compare a model made of one mixer, on compiled kernels and on references.

    The truth of one step is the reference in float64. The truth of a training run is the reference's own; how far runs
    may drift apart is measured by a second reference run whose first weights differ by one rounding.
    """

    def verdict(
        check: str, ok: bool, error: float | None = None, tolerance: float | None = None, detail: str = ""
    ) -> Check:
        return Check(
            subject=spec.name,
            device=str(device),
            dtype="float32",
            backend="compiled",
            check=check,
            ok=ok,
            error=error,
            tolerance=tolerance,
            detail=detail,
        )

    absent = [status for op in spec.ops if not (status := kernel_status(op, device.type)).compiled]
    if absent:
        yield verdict("kernels exist", False, detail="; ".join(f"{status.op}: {status.detail}" for status in absent))
        return
    loss, gradients = _step(spec, device, "compiled", torch.float32)
    same_loss, same = _step(spec, device, "reference", torch.float32)
    true_loss, truth = _step(spec, device, "reference", torch.float64)
    error, allowed = relative_error(loss, true_loss), _allowed(same_loss, true_loss, FORWARD_FACTOR)
    yield verdict("model loss", error <= allowed, error, allowed)
    worst = max(
        (relative_error(gradients[name], want) / _allowed(same[name], want, GRADIENT_FACTOR), name)
        for name, want in truth.items()
    )[1]
    error, allowed = (
        relative_error(gradients[worst], truth[worst]),
        _allowed(same[worst], truth[worst], GRADIENT_FACTOR),
    )
    yield verdict("model gradients", error <= allowed, error, allowed, f"worst in {worst}, of {len(truth)} parameters")
    reference = _curve(spec, device, "reference")
    nudged = _curve(spec, device, "reference", nudge=torch.finfo(torch.float32).eps)
    compiled = _curve(spec, device, "compiled")
    error = float((compiled - reference).abs().max() / reference.abs().max())
    allowed = GRADIENT_FACTOR * float((nudged - reference).abs().max() / reference.abs().max()) + 1e-5
    fell = f"loss {reference[0]:.3f} -> {reference[-1]:.3f}"
    yield verdict(f"loss curve of {STEPS} steps", error <= allowed, error, allowed, fell)


def _allowed(same: Tensor, truth: Tensor, factor: float) -> float:
    return factor * relative_error(same, truth) + floor_of(torch.float32)


def _model(spec: BlockSpec, device: torch.device) -> MaskedLM:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        retention_heads=2,
        ffn_hidden_size=64,
        dropout=0.0,
        layer_pattern=(spec.name,),
    )
    return build_model(config).to(device)


def _batch(device: torch.device, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (text with a period, so that there is something to learn), segments and labels."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(0, VOCABULARY, (ROWS, 1), generator=generator)
    ids = (start + 3 * torch.arange(LENGTH)) % VOCABULARY
    segments = torch.zeros(LENGTH, dtype=torch.int64)
    segments[: sum(DOCUMENTS)] = torch.repeat_interleave(torch.arange(1, len(DOCUMENTS) + 1), torch.tensor(DOCUMENTS))
    segments = segments.expand(ROWS, LENGTH)
    chosen = (torch.rand(ROWS, LENGTH, generator=generator) < 0.3) & segments.ne(0)
    chosen[:, 0] = True
    return (
        ids.masked_fill(chosen, 0).to(device),
        segments.contiguous().to(device),
        ids.masked_fill(~chosen, IGNORED).to(device),
    )


def _loss(model: MaskedLM, device: torch.device, step: int) -> Tensor:
    ids, segments, labels = _batch(device, step)
    output = model(ids, segments=segments, labels=labels)
    total: Tensor = output.loss_sum / output.num_targets
    return total


def _step(
    spec: BlockSpec, device: torch.device, policy: Policy, dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor]]:
    model = _model(spec, device).to(dtype)
    with kernel_policy(policy):
        loss = _loss(model, device, 0)
        loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _curve(spec: BlockSpec, device: torch.device, policy: Policy, nudge: float = 0.0) -> Tensor:
    model = _model(spec, device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + nudge)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    with kernel_policy(policy):
        for step in range(STEPS):
            loss = _loss(model, device, step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return torch.stack(losses).double()
