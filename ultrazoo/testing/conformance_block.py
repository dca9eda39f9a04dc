"""The checks of one block, and of the ops that it names."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ultrazoo.bench.calls import calls_of
from ultrazoo.bench.timing import interleave
from ultrazoo.callables import construct
from ultrazoo.config import ModelConfig, block_config, model_around
from ultrazoo.ops.library import get_kernel_policy, kernel_status, library_of
from ultrazoo.registry import registry
from ultrazoo.spec import BlockSpec
from ultrazoo.testing import conformance_model as models
from ultrazoo.testing import conformance_training as training
from ultrazoo.testing.conformance_result import Finding, absent, bounded, figure
from ultrazoo.testing.kernel_laws import CPU, compiled_laws_of, hold_on_kernels, kernels_of
from ultrazoo.testing.law_kit import Subject, packed_rows
from ultrazoo.testing.laws import LAWS, LawResult, LawViolation, laws_of
from ultrazoo.testing.measure import Check as Comparison
from ultrazoo.testing.measure import badness
from ultrazoo.testing.model_parity import ModelSubject, check_curve, check_step, kernels_absent, subject_of

Check = Callable[[BlockSpec], Finding]
YARDSTICK = "standard_attn"
WIDTHS = (384, 128, 256, 512, 768)
SHAPES = {True: (2, 128, 0.2), False: (8, 256, 1.0)}
"""Quick or not -> rows, tokens of a row and seconds of the timing."""


def checks_of(
    spec: BlockSpec, *, quick: bool, options: Mapping[str, Any]
) -> Iterator[tuple[str, Callable[[], Finding]]]:
    """Yield name and function of each check.

    Args:
        spec: The block.
        quick: Leave out what is slow and checked in a smaller way already.
        options: Fields of the block's config that differ from the tiny defaults of the laws.
    """
    for name in laws_of(spec.kind):
        yield f"law: {name}", functools.partial(_law, name, spec, options)
    for name in compiled_laws_of(spec, quick=quick):
        yield f"compiled law: {name}", functools.partial(_compiled_law, name, spec, options)
    if spec.kind == "ffn":
        yield "law: auxiliary values", functools.partial(auxiliary, spec)
    if spec.ops:
        yield "ops: are used", functools.partial(ops_used, spec)
    whole: dict[str, Check] = {
        "model: state goes round": models.state_round_trip,
        "model: packing": models.packing,
        "model: half precision": models.half_precision,
        "model: repeatable": models.repeatable,
    }
    if not quick or spec.kind == "embedding":  # the law of the block alone is the quick way
        whole["model: compile"] = models.compiled
    if spec.ops or (spec.kind == "mixer" and "use_bitnet" in spec.config.model_fields):
        whole["model: a step on kernels"] = one_step
        if not quick:
            whole["model: training on kernels"] = loss_curve
    whole |= {
        "training: loss falls": training.train_model,
        "training: by its own weights": training.train_block,
        "size: parameters": parameters,
        "size: state": state_size,
    }
    for check, function in whole.items():
        yield check, functools.partial(function, spec)
    yield "speed: against attention", functools.partial(speed, spec, quick=quick)


def _law(name: str, spec: BlockSpec, options: Mapping[str, Any]) -> Finding:
    return _held(lambda: LAWS[name](spec, options))


def _compiled_law(name: str, spec: BlockSpec, options: Mapping[str, Any]) -> Finding:
    policy, why = kernels_of(spec.ops)
    return absent(why) if policy is None else _held(lambda: hold_on_kernels(name, spec, options, policy))


def _held(law: Callable[[], LawResult]) -> Finding:
    try:
        result = law()
    except LawViolation as violation:
        result = violation.result
    return Finding(
        state="passed" if result.passed else "failed",
        what=result.what,
        measured=result.measured,
        limit=result.limit,
        at_least=result.at_least,
        place="" if result.passed else result.place,
    )


def one_step(spec: BlockSpec) -> Finding:
    """Loss and gradients of a model on compiled kernels have the error of the references."""
    return _on_kernels(spec, check_step)


def loss_curve(spec: BlockSpec) -> Finding:
    """A training run on compiled kernels stays as near to that of the references as rounding lets it."""
    return _on_kernels(spec, lambda subject: [check_curve(subject)])


def _on_kernels(spec: BlockSpec, measure: Callable[[ModelSubject], Iterable[Comparison]]) -> Finding:
    subject = subject_of(spec, CPU)
    if subject is None or get_kernel_policy() == "reference":
        return absent("the kernel policy is reference" if subject else "none of its ops has kernels")
    missing = kernels_absent(subject)
    found = [missing] if missing else list(measure(subject))
    worst = max(found, key=lambda check: (not check.ok, badness(check)))
    return Finding(
        state="passed" if worst.ok else "failed",
        what=f"{worst.check}: {worst.detail}",
        measured=worst.error,
        limit=worst.tolerance,
    )


def auxiliary(spec: BlockSpec) -> Finding:
    """A feed-forward's second value: scalars with a gradient to be added to the loss, detached tensors to be logged."""
    values = Subject(spec, {}).values
    torch.manual_seed(0)
    block = construct(spec, spec.config(**values)).train()
    segments, _ = packed_rows()
    x = torch.randn(*segments.shape, values.get("hidden_size", 8)).requires_grad_()
    dirty = torch.where(segments.eq(0).unsqueeze(2), 1e3, x)
    returned = block(x, segments)
    if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], dict)):
        return Finding(state="failed", what=f"got {type(returned).__name__}, expected (y, dict of tensors)")
    aux, again = returned[1], block(dirty, segments)[1]
    faults = []
    for name, value in aux.items():
        if not isinstance(value, Tensor) or not bool(value.isfinite().all()):
            faults.append(f"{name} is not a finite tensor")
        elif name.endswith("_loss") and (value.dim() or not value.requires_grad):
            faults.append(f"{name} is not a scalar with a gradient")
        elif name.endswith("_factors") and not _is_product(aux, name):
            faults.append(f"{name} is not (2, K) with {name.removesuffix('_factors')}_loss as the sum of its products")
        elif not torch.allclose(value, again[name], rtol=1e-4, atol=1e-6):
            faults.append(f"{name} depends on what stands at padding")
    what = "; ".join(faults) or f"values: {', '.join(aux) or 'none'}"
    return bounded(f"faults of the auxiliary values; {what}", float(len(faults)), 0.0)


def _is_product(aux: Mapping[str, Tensor], name: str) -> bool:
    """Whether the loss that ``name`` belongs to is the sum over K of the product of its rows."""
    value, loss = aux[name], aux.get(name.removesuffix("_factors") + "_loss")
    return (
        loss is not None and value.shape[:1] == (2,) and value.dim() == 2 and torch.allclose(value.prod(0).sum(), loss)
    )


def ops_used(spec: BlockSpec) -> Finding:
    """A forward calls each op that the block names, on the compiled kernel where there is one."""
    model = models.model_of(spec)
    ids = torch.randint(models.SPECIAL, models.VOCABULARY, (2, 48), generator=torch.Generator().manual_seed(1))
    found = calls_of(lambda: model.encode(ids), *{op.partition("::")[0] for op in spec.ops})
    called = {call.name for call in found}
    slow = {call.name for call in found if call.operator._overloadname == "reference"}
    faults = [f"{op} is never called" for op in spec.ops if op not in called]
    faults += [f"{op} has a compiled kernel and runs its reference" for op in spec.ops if op in slow and _compiled(op)]
    what = "; ".join(faults) or f"called: {', '.join(spec.ops)}"
    return bounded(f"ops that are not used; {what}", float(len(faults)), 0.0)


def _compiled(op: str) -> bool:
    return get_kernel_policy() != "reference" and library_of(op) is not None and kernel_status(op, "cpu").compiled


def parameters(spec: BlockSpec) -> Finding:
    """Parameters of one block."""
    block, config = _built(spec)
    return figure(f"parameters of one block at hidden_size {config.hidden_size}", _count(block))


def state_size(spec: BlockSpec) -> Finding:
    """Numbers that the block carries from one position to the next."""
    if spec.kind != "mixer":
        return absent("only a mixer carries a state")
    if spec.state_size is None:
        return figure("every key and value of the row", None)
    _, config = _built(spec)
    numbers = spec.state_size(block_config(spec, config))
    return figure(f"numbers of state per sequence at hidden_size {config.hidden_size}", float(numbers))


def speed(spec: BlockSpec, *, quick: bool) -> Finding:
    """Time of a forward and backward pass over that of standard attention, interleaved; nothing is held to it."""
    if spec.name == YARDSTICK:
        return absent("it is the yardstick")
    rows, length, seconds = SHAPES[quick]
    block, config = _built(spec)
    other = registry().block("mixer", YARDSTICK)
    yardstick = construct(other, block_config(other, config))
    x = torch.randn(rows, length, config.hidden_size)
    if spec.kind == "embedding":
        ids = torch.randint(models.SPECIAL, models.VOCABULARY, (rows, length))
        own = functools.partial(_step, block, ids)
    else:
        own = functools.partial(_step, block, x.clone().requires_grad_())
    theirs = functools.partial(_step, yardstick, x.clone().requires_grad_())
    found = interleave({"own": own, "theirs": theirs}, torch.device("cpu"), seconds=seconds)
    ratio = found["own"].median / found["theirs"].median
    tokens = rows * length
    told = ", ".join(
        f"{name} {found[key].median / tokens * 1e6:.2f}" for key, name in (("own", spec.name), ("theirs", YARDSTICK))
    )
    shape = f"B{rows} L{length} D{config.hidden_size}"
    return figure(
        f"time over that of {YARDSTICK}, forward and backward, {shape}; microseconds per token: {told}", ratio
    )


def _step(block: nn.Module, x: Tensor) -> None:
    y = block(x)
    y = y[0] if isinstance(y, tuple) else y
    if y.requires_grad:
        y.sum().backward()


def _built(spec: BlockSpec) -> tuple[nn.Module, ModelConfig]:
    """One block at a usual width, and the model section around it."""

    def build(width: int) -> tuple[nn.Module, ModelConfig]:
        config = model_around(spec, width)
        torch.manual_seed(0)
        return construct(spec, block_config(spec, config)), config

    return models.first_accepted(WIDTHS, build)


def _count(module: nn.Module) -> float:
    return float(sum(parameter.numel() for parameter in module.parameters()))
