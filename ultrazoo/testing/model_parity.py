"""Holds whole tiny models to themselves: compiled kernels against references, in one step and over a training run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ultrazoo.config import ModelConfig
from ultrazoo.model import IGNORED, MaskedLM, build_model
from ultrazoo.ops import loader
from ultrazoo.ops.library import Policy, kernel_policy, kernel_status, library_of
from ultrazoo.spec import BlockSpec
from ultrazoo.testing.laws import run_laws
from ultrazoo.testing.measure import FORWARD_FACTOR, GRADIENT_FACTOR, Check, floor_of, relative_error

VOCABULARY, ROWS, LENGTH = 64, 4, 72
STEPS = 50
DOCUMENTS = (30, 1, 33)
"""Lengths of the documents of each row; the rest is padding."""
NOISY_RUNS = 3
BITNET_OP = "ultrazoo::bitlinear"


def check_block(spec: BlockSpec, device: torch.device) -> Iterator[Check]:
    """Yield every verdict on a mixer: its laws, and a model made of it on compiled kernels and on references.

    The model of a mixer without ops that have kernels is one of BitLinear layers, if it has those. A plugin's ops count
    as ultrazoo's own do, where their library has kernel sources.
    """
    yield from check_laws(spec)
    proved = with_kernels(spec.ops, device)
    if proved or "use_bitnet" in spec.config.model_fields:
        yield from check_model(spec, device, bitnet=not proved)


def with_kernels(ops: Iterable[str], device: torch.device) -> list[str]:
    """Return those of the ops, by full name, that are to have a kernel on a device: their library has its sources.

    On a GPU an op without one, in a library that has CUDA kernels, has none by design, such as ``ultrazoo::attention``.
    """

    def expected(op: str) -> bool:
        if (library := library_of(op)) is None or not library.has_sources:
            return False
        if device.type == "cpu" or loader.cuda_kernels(library.namespace) is None:
            return True
        return torch._C._dispatch_has_kernel_for_dispatch_key(op, device.type.upper())

    return [op for op in ops if expected(op)]


def check_laws(spec: BlockSpec) -> Iterator[Check]:
    """Yield one verdict per law of the mixer contract, on the CPU."""
    for result in run_laws(spec):
        yield Check(
            subject=spec.name,
            device="cpu",
            dtype="float64",
            backend="block",
            check=f"law {result.number}: {result.law}",
            ok=result.passed,
            error=result.measured,
            tolerance=result.limit,
            detail=result.what,
        )


def check_model(spec: BlockSpec, device: torch.device, *, bitnet: bool) -> Iterator[Check]:
    """Compare a model of two layers on compiled kernels and on references.

    The truth of one step is the reference in float64, and the rule is that of the ops. The truth of a training run is
    the reference's own; how far rounding alone drives two runs apart is measured by further reference runs, whose
    weights are moved up or down by one rounding after every step. Ops without kernels run their references on both
    sides.

    Args:
        spec: The mixer.
        device: Where.
        bitnet: Make the linear layers BitLinear, and hold that kernel to its reference too.
    """

    def verdict(
        check: str, ok: bool, error: float | None = None, tolerance: float | None = None, detail: str = ""
    ) -> Check:
        return Check(
            subject=f"{spec.name}, bitnet" if bitnet else spec.name,
            device=str(device),
            dtype="float32",
            backend="model",
            check=check,
            ok=ok,
            error=error,
            tolerance=tolerance,
            detail=detail,
        )

    ops = (*spec.ops, BITNET_OP) if bitnet else spec.ops
    proved = with_kernels(ops, device)
    absent = [status for op in proved if not (status := kernel_status(op, device.type)).compiled]
    if absent:
        yield verdict("kernels exist", False, detail="; ".join(f"{status.op}: {status.detail}" for status in absent))
        return
    fast: Policy = "compiled" if len(proved) == len(ops) else "auto"
    runs = ", ".join(f"{op} {'compiled' if op in proved else 'by its reference'}" for op in ops)
    loss, gradients = _step(spec, device, fast, torch.float32, bitnet)
    same_loss, same = _step(spec, device, "reference", torch.float32, bitnet)
    true_loss, truth = _step(spec, device, "reference", torch.float64, bitnet)
    error, allowed = relative_error(loss, true_loss), _allowed(same_loss, true_loss, FORWARD_FACTOR)
    yield verdict("model loss", error <= allowed, error, allowed, runs)
    if set(gradients) != set(truth):
        yield verdict("model gradients", False, detail=f"{sorted(set(gradients) ^ set(truth))} missing on one side")
        return
    errors = {name: relative_error(gradients[name], want) for name, want in truth.items()}
    tolerances = {name: _allowed(same[name], want, GRADIENT_FACTOR) for name, want in truth.items()}
    worst = max(truth, key=lambda name: errors[name] / tolerances[name])
    detail = f"worst in {worst}, of {len(truth)} parameters"
    ok = errors[worst] <= tolerances[worst]
    yield verdict("model gradients", ok, errors[worst], tolerances[worst], detail)
    reference, compiled = (_curve(spec, device, policy, bitnet) for policy in ("reference", fast))
    noisy = [_curve(spec, device, "reference", bitnet, noise=seed) for seed in range(1, NOISY_RUNS + 1)]
    drift = max(relative_error(curve, reference) for curve in noisy)
    error, allowed = relative_error(compiled, reference), GRADIENT_FACTOR * drift + floor_of(torch.float32)
    fell = f"loss {reference[0]:.3f} -> {reference[-1]:.3f}, rounding alone {drift:.1e}"
    yield verdict(f"loss curve of {STEPS} steps", error <= allowed, error, allowed, fell)


def _allowed(same: Tensor, truth: Tensor, factor: float) -> float:
    return factor * relative_error(same, truth) + floor_of(torch.float32)


def _model(spec: BlockSpec, device: torch.device, bitnet: bool) -> MaskedLM:
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
        use_bitnet=bitnet,
    )
    return build_model(config).to(device)


def _batch(device: torch.device, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids (text with a period, so that there is something to learn), segments and labels."""
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
    spec: BlockSpec, device: torch.device, policy: Policy, dtype: torch.dtype, bitnet: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    model = _model(spec, device, bitnet).to(dtype)
    with kernel_policy(policy):
        loss = _loss(model, device, 0)
        loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _curve(spec: BlockSpec, device: torch.device, policy: Policy, bitnet: bool, noise: int = 0) -> Tensor:
    """Return the losses (STEPS,) of a run; ``noise``, if not 0, seeds the roundings that its weights are moved by."""
    model = _model(spec, device, bitnet)
    generator = torch.Generator(device).manual_seed(noise)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    with kernel_policy(policy):
        for step in range(STEPS):
            loss = _loss(model, device, step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            for p in model.parameters() if noise else ():
                sign = torch.randint(0, 2, p.shape, generator=generator, device=device).mul_(2).sub_(1)
                p.data.mul_(1 + torch.finfo(p.dtype).eps * sign)
    return torch.stack(losses).double()
