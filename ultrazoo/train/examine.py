"""Runs one step under a watch on every operator, and follows a NaN or an infinity back to where it arose."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.module_tracker import ModuleTracker

from ultrazoo.train.amp import Precision
from ultrazoo.train.objective import accumulate
from ultrazoo.train.statistics import block_of, gradient_statistics

if TYPE_CHECKING:
    from ultrazoo.data import Batch

UNWRITTEN = ("empty", "new_empty", "resize")
"""Operators whose results hold whatever was in memory."""
WEIGHTS = "(weights)"

Statistics = dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A result that is not finite: where, by which operator, and what that operator read."""

    direction: str
    """``forward`` or ``backward``."""
    module: str
    """Innermost module, by its name in the model."""
    op: str
    nan: int
    inf: int
    size: int
    dtype: str
    largest_input: float
    """Largest finite absolute value that the operator read."""
    reads: tuple[int, ...] = ()
    """Earlier findings among its arguments."""

    def __str__(self) -> str:
        kinds = [f"{count:,} {kind}" for count, kind in ((self.nan, "NaN"), (self.inf, "infinite")) if count]
        counts = f"{' and '.join(kinds)} of {self.size:,} values"
        if self.op == WEIGHTS:
            return f"{self.module}: {counts} of the weights themselves"
        read = f", from arguments up to {self.largest_input:.3g}" if self.largest_input else ""
        return f"{self.module}, {self.op}, {self.direction}: {counts}{read}"


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What one step did when it was repeated."""

    loss: float
    norm: float
    """Of the gradient, before clipping."""
    origin: Finding | None
    """First result on the way to the bad loss or gradient that is not finite though what it came from was; where
    that way leads from an infinity to a NaN, the first NaN."""
    overflow: Finding | None
    """The first infinity on the way to that NaN, if it had one."""
    way: tuple[Finding, ...]
    """From the origin to the loss or gradient, the first finding in each module."""
    activations: Statistics
    """Per block: largest and mean absolute value of the output, finite values only, the highest of the calls; and the
    number of values that are not finite, over the calls."""
    gradients: Statistics

    @property
    def finite(self) -> bool:
        """True when loss and gradient were."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


def examine(
    model: nn.Module, batches: Sequence[Batch], precision: Precision, *, exact_balance: bool = False
) -> Examination:
    """Run forward and backward over the micro-batches of one step; gradients are removed, weights are not touched.

    Random numbers are drawn from the streams as they stand. An operator is what torch dispatches: inside a compiled
    kernel, or a reference that runs in its place, nothing is told apart.

    Args:
        model: The model, in the mode that it is to be examined in.
        batches: The micro-batches.
        precision: Device and dtype.
        exact_balance: As in training; see ``accumulate``.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    blocks = {block_of(name) for name, _ in named}
    activations: Statistics = {}
    model.zero_grad(set_to_none=True)
    with ExitStack() as stack:
        stack.callback(model.zero_grad, set_to_none=True)
        for name, module in model.named_modules():
            if name in blocks:
                handle = module.register_forward_hook(_record_output(name, activations))
                stack.callback(handle.remove)
        watch = _Watch(stack.enter_context(ModuleTracker()))
        watch.add_weights(model)
        with watch:
            sums, _ = accumulate(model, batches, precision, exact_balance=exact_balance)
        gradients = [parameter.grad for _, parameter in named if parameter.grad is not None]
        if precision.scaled:
            torch._foreach_mul_(gradients, 1 / precision.scaler.get_scale())
        loss = sums["objective"].item()
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))).item()
        ends = [sums["objective"]] if not math.isfinite(loss) else gradients
        found = [event for tensor in ends if (event := watch.event_of(tensor)) is not None]
        statistics = gradient_statistics(named)
    way = _way_back(watch.events, min(found)) if found else []
    origin = next((finding for finding in way if finding.nan), way[0] if way else None)
    return Examination(
        loss=loss,
        norm=norm,
        origin=origin,
        overflow=way[0] if origin is not None and origin.nan and not way[0].nan else None,
        way=tuple({finding.module: finding for finding in reversed(way)}.values())[::-1],
        activations=activations,
        gradients=statistics,
    )


def _record_output(block: str, into: Statistics) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        tensor = next((leaf for leaf in tree_leaves(output) if _holds_numbers(leaf)), None)
        if tensor is None:
            return
        size = tensor.detach().float().abs()
        finite = torch.isfinite(size)
        kept = size[finite]
        entry = into.setdefault(block, {"mean_abs": 0.0, "max": 0.0, "not_finite": 0.0})
        if kept.numel():
            entry["mean_abs"] = max(entry["mean_abs"], kept.div(kept.numel()).sum().item())
            entry["max"] = max(entry["max"], kept.max().item())
        entry["not_finite"] += finite.logical_not().sum().item()

    return hook


@dataclass
class _Watch(TorchDispatchMode):
    """Counts what is not finite in the result of every operator, and remembers which results it was made from."""

    tracker: ModuleTracker
    events: list[Finding] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._made: dict[tuple[torch.device, int], int] = {}
        """Memory of a result that is not finite -> its event."""

    def add_weights(self, model: nn.Module) -> None:
        """Note the parameters and buffers that are not finite to begin with."""
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if _holds_numbers(tensor) and not _is_finite(tensor):
                self._note(tensor, "forward", name, WEIGHTS, 0.0, ())

    def event_of(self, tensor: Tensor) -> int | None:
        """The event that a tensor which is not finite comes from."""
        event = self._made.get(_place(tensor))
        return None if event is None or _is_finite(tensor) else event

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if _holds_numbers(leaf)]
        places = {_place(tensor) for tensor in inputs}
        reads = {event for tensor in inputs if (event := self.event_of(tensor)) is not None}
        name = func.name().removeprefix("aten::").split(".")[0]
        writes_inputs = func._schema.is_mutable
        largest = None if reads or not writes_inputs else _largest_finite(inputs)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not _holds_numbers(tensor):
                continue
            if name.startswith(UNWRITTEN) or _is_finite(tensor):
                if _place(tensor) not in places:  # new memory, or memory that is in use again
                    self._made.pop(_place(tensor), None)
            elif writes_inputs or _place(tensor) not in places:  # a view is the tensor that it looks at
                if largest is None:
                    largest = _largest_finite(inputs)
                op = func.name().split(".")[0]
                direction = "backward" if self.tracker.is_bw else "forward"
                self._note(tensor, direction, self._module(), op, largest, tuple(sorted(reads)))
        return result

    def _module(self) -> str:
        inside = sorted(self.tracker.parents - {"Global"}, key=lambda name: (name.count("."), name))
        return inside[-1].partition(".")[2] or "model" if inside else "objective"

    def _note(
        self, tensor: Tensor, direction: str, module: str, op: str, largest: float, reads: tuple[int, ...]
    ) -> None:
        detached = tensor.detach()
        self._made[_place(tensor)] = len(self.events)
        self.events.append(
            Finding(
                direction=direction,
                module=module,
                op=op,
                nan=int(detached.isnan().sum()),
                inf=int(detached.isinf().sum()),
                size=detached.numel(),
                dtype=str(detached.dtype).removeprefix("torch."),
                largest_input=largest,
                reads=reads,
            )
        )


def _way_back(events: Sequence[Finding], end: int) -> list[Finding]:
    """Findings from the first cause to ``end``: of several bad arguments the one with NaN, and the earliest, leads."""

    def steps() -> Iterator[Finding]:
        index: int | None = end
        while index is not None:
            yield events[index]
            reads = events[index].reads
            with_nan = [read for read in reads if events[read].nan]
            index = min(with_nan or reads, default=None)

    return list(steps())[::-1]


def _holds_numbers(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 0


def _place(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor.detach()).all())


def _largest_finite(tensors: Sequence[Tensor]) -> float:
    peaks = [torch.where(torch.isfinite(t), t.detach(), 0).abs().max().item() for t in tensors]
    return max(peaks, default=0.0)
