"""Training with many processes: replicas of the model (DDP), or a shard of every tensor in each (FSDP2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ultrazoo.config import TrainingConfig
from ultrazoo.errors import ConfigError
from ultrazoo.nn.moe import MoE
from ultrazoo.train.checkpoint import copy_tensors, load_optimizer, model_tensors
from ultrazoo.train.runtime import rng_state, seed_everything, set_rng_state
from ultrazoo.train.team import FollowerError, Named, Team, Totals, _note_on_size, seed_of

if TYPE_CHECKING:
    from ultrazoo.data import Batch

PATIENCE = timedelta(days=30)
"""For the first process to tokenise all data; one that dies is noticed at once."""
T = TypeVar("T")


class Replicas(Team):
    """Each process has the whole model; gradients are averaged while the backward pass goes on.

    Args:
        rank: Number of this process.
        size: Number of processes.
        training: The training section.
    """

    kind = "ddp"

    def __init__(self, rank: int, size: int, training: TrainingConfig) -> None:
        self.rank, self.size, self.training = rank, size, training
        self._token = torch.zeros(1)
        self._patient = dist.new_group(backend="gloo", timeout=PATIENCE)

    def take(self, model: nn.Module) -> tuple[nn.Module, Named]:
        self._own_seed(model)
        wrapped = DistributedDataParallel(model, forward_sync_buffers=False, gradient_as_bucket_view=True)
        return wrapped, super().take(model)[1]

    def totals(self, batches: Sequence[Batch]) -> Totals:
        own = super().totals(batches)
        both = torch.tensor([own.targets, own.tokens])
        dist.all_reduce(both)
        return Totals(*both.tolist())

    def micro_step(self, model: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync()

    def sum(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        if not values:
            return values
        table = torch.stack([value.float() for value in values.values()])
        dist.all_reduce(table)
        return dict(zip(values, table.unbind(), strict=True))

    def total(self, numbers: Sequence[float]) -> list[float]:
        table = torch.tensor(list(numbers), dtype=torch.float64)
        dist.all_reduce(table)
        return table.tolist()

    def clock(self, seconds: float) -> float:
        if self.training.max_minutes is None:
            return seconds  # nothing that the processes must agree on depends on it
        first = torch.tensor([seconds], dtype=torch.float64)
        dist.broadcast(first, 0)
        return float(first)

    def leader_says(self, work: Callable[[], T]) -> T:
        return self._from_leader(work, None)

    def in_turn(self, work: Callable[[], T]) -> T:
        mine: list[T] = []
        self._from_leader(lambda: mine.append(work()), self._patient)
        if not self.leads:
            mine.append(work())
        dist.all_reduce(self._token, group=self._patient)
        return mine[0]

    def _from_leader(self, work: Callable[[], T], group: dist.ProcessGroup | None) -> T:
        message: list[Any] = [None, False]
        try:
            if self.leads:
                message = [work(), True]
        finally:
            dist.broadcast_object_list(message, 0, group=group)
        if not message[1]:
            raise FollowerError
        result: T = message[0]
        return result

    def agree(self, flags: Sequence[int]) -> list[int]:
        table = torch.tensor(list(flags))
        dist.all_reduce(table, dist.ReduceOp.MAX)
        return table.tolist()

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        dist.all_reduce(self._token)

    def random_states(self, device: torch.device) -> dict[str, Any]:
        first, *others = self.gather(rng_state(device))
        return {"rng": first, "rng_others": others}

    def set_random_states(self, state: Mapping[str, Any], device: torch.device) -> str:
        saved = [state["rng"], *state.get("rng_others", [])]
        if self.rank == 0 or len(saved) == self.size:
            set_rng_state(saved[self.rank], device)
        else:
            seed_everything(seed_of(self.training.seed, self.rank, state["step"]))
        return _note_on_size(len(saved), self.size)

    def _own_seed(self, model: nn.Module) -> None:
        """Give every process but the first dropout of its own, and let experts be counted over all processes."""
        if self.rank:
            seed_everything(seed_of(self.training.seed, self.rank))
        for module in model.modules():
            if isinstance(module, MoE):
                module.sum_counts = _sum_counts


class Shards(Replicas):
    """Each process has a shard of every tensor, gathered layer by layer when it is needed (FSDP2).

    The optimiser works on plain tensors that share the memory of the shards, so it and all that reads gradients is the
    same as for one process.
    """

    kind = "fsdp"

    def take(self, model: nn.Module) -> tuple[nn.Module, Named]:
        named = dict(model.named_parameters())
        _refuse(named)
        self._saved = list(model_tensors(model))
        flagged = {name for name, p in named.items() if getattr(p, "_no_weight_decay", False)}
        device = next(iter(named.values())).device.type
        self._mesh = init_device_mesh(device, (self.size,))
        self._own_seed(model)
        for layer in model.layers:  # type: ignore[union-attr]
            fully_shard(layer, mesh=self._mesh)
        fully_shard(model, mesh=self._mesh)
        self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        shards: Named = []
        for name, whole in model.named_parameters():
            if name in flagged:
                whole._no_weight_decay = True  # type: ignore[attr-defined]
            if whole.requires_grad:
                shard = nn.Parameter(_local(whole))
                self._pairs.append((whole, shard))
                shards.append((name, shard))
        self._whole: dict[Tensor, nn.Parameter] = {shard: whole for whole, shard in self._pairs}
        return model, shards

    def micro_step(self, model: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        model.set_requires_gradient_sync(last)  # type: ignore[operator]
        return nullcontext()

    def collect(self) -> None:
        for whole, shard in self._pairs:
            shard.grad = None if whole.grad is None else _local(whole.grad)
            whole.grad = None

    def norm(self, gradients: list[Tensor]) -> Tensor:
        square = super().norm(gradients).square()
        dist.all_reduce(square)
        return square.sqrt()

    def merge(self, rows: Mapping[str, list[float]], *, largest: bool = False) -> dict[str, list[float]]:
        table = torch.tensor(list(rows.values()), dtype=torch.float64)
        dist.all_reduce(table, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
        return dict(zip(rows, table.tolist(), strict=True))

    def model_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        own = model.state_dict()
        return self._for_leader((name, own[name]) for name in self._saved)

    def optimizer_tensors(self, optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
        return self._for_leader(
            (f"{names[shard]}/{key}", self._like(value, shard))
            for shard, state in optimizer.state.items()
            for key, value in state.items()
        )

    def load_model(self, folder: Path, model: nn.Module) -> None:
        own = model.state_dict()
        copy_tensors(folder, {name: own[name] for name in self._saved}, self._put)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def load_optimizer(self, folder: Path, optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> None:
        wholes = {names[shard]: whole for shard, whole in self._whole.items()}
        load_optimizer(folder, optimizer, names, lambda name, saved: self._part(saved, wholes[name]))

    def _put(self, own: Tensor, saved: Tensor) -> None:
        (_local(own) if isinstance(own, DTensor) else own).copy_(self._part(saved, own))

    def _part(self, saved: Tensor, whole: Tensor) -> Tensor:
        """This process's shard of a whole tensor; numbers, such as a count of steps, are whole everywhere."""
        if saved.ndim == 0 or not isinstance(whole, DTensor):
            return saved
        moved = saved.to(whole.device)
        return _local(distribute_tensor(moved, whole.device_mesh, whole.placements, src_data_rank=None))

    def _like(self, value: Tensor, shard: Tensor) -> Tensor:
        """A shard of the optimiser's state as the distributed tensor that it is part of."""
        whole = self._whole[shard]
        if value.ndim == 0 or not isinstance(whole, DTensor):
            return value
        return DTensor.from_local(value, whole.device_mesh, whole.placements, shape=whole.shape, stride=whole.stride())

    def _for_leader(self, named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Gather tensors one after the other; all but the first process let go of each at once."""
        kept: dict[str, Tensor] = {}
        for name, tensor in named:
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.leads:
                kept[name] = whole.detach().cpu()
        return kept


def _local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _sum_counts(counts: Tensor) -> Tensor:
    summed = counts.clone()
    dist.all_reduce(summed)
    return summed


def _refuse(named: Mapping[str, nn.Parameter]) -> None:
    scalars = [name for name, parameter in named.items() if parameter.ndim == 0]
    if scalars:
        raise ConfigError(
            f"training.distributed: fsdp cannot shard {scalars[0]}, which has no dimension; "
            "use ddp, or give the parameter the shape (1,)"
        )
