"""Holds whole tiny models to themselves: compiled kernels against references, in one step and over a training run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ultrazoo.model import IGNORED, MaskedLM
from ultrazoo.ops import loader
from ultrazoo.ops.library import Policy, kernel_policy, kernel_status, library_of
from ultrazoo.spec import BlockSpec
from ultrazoo.testing.conformance_model import model_of
from ultrazoo.testing.laws import run_laws
from ultrazoo.testing.measure import FORWARD_FACTOR, GRADIENT_FACTOR, Check, floor_of, relative_error

VOCABULARY, ROWS, LENGTH = 64, 4, 72
STEPS = 50
DOCUMENTS = (30, 1, 33)
"""Lengths of the documents of each row; the rest is padding."""
NOISY_RUNS = 3
BITNET_OP = "ultrazoo::bitlinear"


def check_block(spec: BlockSpec, device: torch.device) -> Iterator[Check]:
    """Yield every verdict on a mixer: its laws, and a model made of it on compiled kernels and on references."""
    yield from check_laws(spec)
    subject = subject_of(spec, device)
    if subject is not None:
        yield from check_model(subject)


@dataclass(frozen=True)
class ModelSubject:
    """A model of two layers to compare on compiled kernels and on references."""

    spec: BlockSpec
    device: torch.device
    bitnet: bool = False
    """Its linear layers are BitLinear, whose kernel is compared too."""

    @property
    def ops(self) -> tuple[str, ...]:
        """The ops that it calls, by full name."""
        return (*self.spec.ops, BITNET_OP) if self.bitnet else self.spec.ops

    @property
    def kernels(self) -> list[str]:
        """Those of the ops that are to have a kernel."""
        return with_kernels(self.ops, self.device)

    @property
    def policy(self) -> Policy:
        """The kernel policy that runs them. Ops without kernels run their references beside them."""
        return "compiled" if len(self.kernels) == len(self.ops) else "auto"

    def verdict(
        self, check: str, ok: bool, error: float | None = None, tolerance: float | None = None, detail: str = ""
    ) -> Check:
        """Return a verdict on the model."""
        return Check(
            subject=f"{self.spec.name}, bitnet" if self.bitnet else self.spec.name,
            device=str(self.device),
            dtype="float32",
            backend="model",
            check=check,
            ok=ok,
            error=error,
            tolerance=tolerance,
            detail=detail,
        )


def subject_of(spec: BlockSpec, device: torch.device) -> ModelSubject | None:
    """Return the model to compare: of the block, or of a mixer with BitLinear layers if its ops have no kernels.

    A plugin's ops count as ultrazoo's own do, where their library has kernel sources.

    Returns:
        None if there is no kernel to compare.
    """
    bitnet = not with_kernels(spec.ops, device)
    if bitnet and (spec.kind != "mixer" or "use_bitnet" not in spec.config.model_fields):
        return None
    return ModelSubject(spec, device, bitnet)


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
            detail=result.what if result.passed or not result.place else f"{result.what} ({result.place})",
        )


def check_model(subject: ModelSubject) -> Iterator[Check]:
    """Compare a model on compiled kernels and on references, in one step and over a training run."""
    if absent := kernels_absent(subject):
        yield absent
        return
    step = list(check_step(subject))
    yield from step
    if len(step) > 1:
        yield check_curve(subject)


def kernels_absent(subject: ModelSubject) -> Check | None:
    """Return the failed verdict on kernels that should be there and are not; None if all of them are."""
    absent = [status for op in subject.kernels if not (status := kernel_status(op, subject.device.type)).compiled]
    detail = "; ".join(f"{status.op}: {status.detail}; {status.fix}" for status in absent)
    return subject.verdict("kernels exist", False, detail=detail) if absent else None


def check_step(subject: ModelSubject) -> Iterator[Check]:
    """Compare loss and gradients of one step by the rule of the ops; the truth is the reference in float64.

    The reference's own error is the largest of several runs, whose weights are moved up or down by one rounding: that
    of a single run may be small by chance.
    """
    loss, gradients = _step(subject, subject.policy, torch.float32)
    own = [_step(subject, "reference", torch.float32, noise=seed) for seed in range(NOISY_RUNS + 1)]
    true_loss, truth = _step(subject, "reference", torch.float64)
    runs = ", ".join(f"{op} {'compiled' if op in subject.kernels else 'by its reference'}" for op in subject.ops)
    error, allowed = relative_error(loss, true_loss), _allowed([same for same, _ in own], true_loss, FORWARD_FACTOR)
    yield subject.verdict("model loss", error <= allowed, error, allowed, runs)
    if set(gradients) != set(truth):
        detail = f"{sorted(set(gradients) ^ set(truth))} missing on one side"
        yield subject.verdict("model gradients", False, detail=detail)
        return
    errors = {name: relative_error(gradients[name], want) for name, want in truth.items()}
    tolerances = {
        name: _allowed([same[name] for _, same in own], want, GRADIENT_FACTOR) for name, want in truth.items()
    }
    worst = max(truth, key=lambda name: errors[name] / tolerances[name])
    detail = f"worst in {worst}, of {len(truth)} parameters"
    ok = errors[worst] <= tolerances[worst]
    yield subject.verdict("model gradients", ok, errors[worst], tolerances[worst], detail)


def check_curve(subject: ModelSubject) -> Check:
    """Compare the losses of a training run with those of the reference.

    How far rounding alone drives two runs apart is measured by further reference runs, whose weights are moved up or
    down by one rounding after every step.
    """
    reference, compiled = (_curve(subject, policy) for policy in ("reference", subject.policy))
    noisy = [_curve(subject, "reference", noise=seed) for seed in range(1, NOISY_RUNS + 1)]
    drift = max(relative_error(curve, reference) for curve in noisy)
    error, allowed = relative_error(compiled, reference), GRADIENT_FACTOR * drift + floor_of(torch.float32)
    fell = f"loss {reference[0]:.3f} -> {reference[-1]:.3f}, rounding alone {drift:.1e}"
    return subject.verdict(f"loss curve of {STEPS} steps", error <= allowed, error, allowed, fell)


def _allowed(own: Sequence[Tensor], truth: Tensor, factor: float) -> float:
    return factor * max(relative_error(same, truth) for same in own) + floor_of(torch.float32)


def _model(subject: ModelSubject) -> MaskedLM:
    return model_of(subject.spec, vocab_size=VOCABULARY, use_bitnet=subject.bitnet).to(subject.device)


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
    subject: ModelSubject, policy: Policy, dtype: torch.dtype, noise: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    model = _model(subject).to(dtype)
    if noise:
        _move(model, torch.Generator(subject.device).manual_seed(noise))
    with kernel_policy(policy):
        loss = _loss(model, subject.device, 0)
        loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _move(model: MaskedLM, generator: torch.Generator) -> None:
    """Move every weight up or down by one rounding."""
    for p in model.parameters():
        sign = torch.randint(0, 2, p.shape, generator=generator, device=p.device).mul_(2).sub_(1)
        p.data.mul_(1 + torch.finfo(p.dtype).eps * sign)


def _curve(subject: ModelSubject, policy: Policy, noise: int = 0) -> Tensor:
    """Return the losses (STEPS,) of a run; ``noise``, if not 0, seeds the roundings that its weights are moved by."""
    model, device = _model(subject), subject.device
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
            if noise:
                _move(model, generator)
    return torch.stack(losses).double()
