"""The processes that train together: one alone, or those that torchrun started."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ultrazoo.config import TrainingConfig
from ultrazoo.errors import ConfigError, NonFiniteError, UltrazooError
from ultrazoo.model import IGNORED
from ultrazoo.train.checkpoint import load_model, load_optimizer, model_tensors, optimizer_tensors
from ultrazoo.train.runtime import rng_state, set_rng_state
from ultrazoo.train.signals import StoppedError

if TYPE_CHECKING:
    from ultrazoo.data import Batch

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LOST = ("Connection closed by peer", "Connection reset", "Broken pipe", "Timed out", "timed out", "NCCL", "Socket")
SETTLE_SECONDS = 0.2
STRIDE = 1_000_003
T = TypeVar("T")
Named = list[tuple[str, nn.Parameter]]


class LostProcessError(UltrazooError):
    """Another process of the job is gone, or has not answered in time."""


class FollowerError(UltrazooError):
    """This process ends with the first one, which says why; the message is empty."""

    def __init__(self, exit_code: int = 1) -> None:
        super().__init__("")
        self.exit_code = exit_code


@dataclass(frozen=True)
class Totals:
    """Of the whole step, over micro-batches and processes."""

    targets: int
    tokens: int


class Team:
    """One process alone. What many do differently is overridden; here nothing is sent and nothing is changed."""

    kind = "alone"
    rank, size = 0, 1

    @property
    def leads(self) -> bool:
        """True in the one process that writes files and speaks."""
        return self.rank == 0

    def take(self, model: nn.Module) -> tuple[nn.Module, Named]:
        """Prepare a model for training; return what to call for a step, and the parameters to update, by name."""
        return model, [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    def totals(self, batches: Sequence[Batch]) -> Totals:
        """Count targets and real tokens of a step."""
        targets = sum(int((batch.labels != IGNORED).sum()) for batch in batches)
        return Totals(targets, sum(batch.num_tokens for batch in batches))

    def micro_step(self, model: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        """Context of a forward and backward pass; gradients are exchanged in the last one only."""
        return nullcontext()

    def collect(self) -> None:
        """Put the gradients of a step where the optimiser looks for them."""

    def sum(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sum scalars over the processes."""
        return values

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """Euclidean norm over all gradients."""
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))

    def merge(self, rows: Mapping[str, list[float]], *, largest: bool = False) -> dict[str, list[float]]:
        """Add up (or take the largest of) numbers of which each process has those of its part of every tensor."""
        return dict(rows)

    def total(self, numbers: Sequence[float]) -> list[float]:
        """Sum numbers over the processes, in float64."""
        return list(numbers)

    def clock(self, seconds: float) -> float:
        """Seconds of the first process."""
        return seconds

    def leader_says(self, work: Callable[[], T]) -> T:
        """Run ``work`` in the first process and return there what it returned in every process.

        Raises:
            FollowerError: In the others, if it raised in the first.
        """
        return work()

    def in_turn(self, work: Callable[[], T]) -> T:
        """Run ``work`` in the first process, then in the others, however long it takes.

        Raises:
            FollowerError: In the others, if it raised in the first.
        """
        return work()

    def agree(self, flags: Sequence[int]) -> list[int]:
        """Largest of each flag over the processes."""
        return list(flags)

    def gather(self, value: T) -> list[T]:
        """What each process gave, by rank, in all of them."""
        return [value]

    def barrier(self) -> None:
        """Wait until all processes are here."""

    def model_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Whole weights by name, in the first process."""
        return model_tensors(model)

    def optimizer_tensors(self, optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
        """Whole state of the optimiser by name, in the first process."""
        return optimizer_tensors(optimizer, names)

    def load_model(self, folder: Path, model: nn.Module) -> None:
        """Take over the weights of a checkpoint."""
        load_model(folder, model)

    def load_optimizer(self, folder: Path, optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> None:
        """Take over the optimiser's state of a checkpoint."""
        load_optimizer(folder, optimizer, names)

    def random_states(self, device: torch.device) -> dict[str, Any]:
        """Entries of a checkpoint's state: random numbers of the first process (``rng``) and of the others."""
        return {"rng": rng_state(device)}

    def set_random_states(self, state: Mapping[str, Any], device: torch.device) -> str:
        """Restore them; return a line for the user if the checkpoint is of another number of processes."""
        set_rng_state(state["rng"], device)
        return _note_on_size(state.get("processes", 1), self.size)


def _note_on_size(saved: int, size: int) -> str:
    if saved == size:
        return ""
    return (
        f"resume: {size} process{'es' * (size > 1)}, the checkpoint had {saved}: same rows, same steps, sums in "
        "another order, and other dropout; to the bit a run goes on only with the number it had"
    )


def seed_of(seed: int, rank: int, step: int = 0) -> int:
    """Seed of the dropout of a process; that of the first is the run's own."""
    return (seed + STRIDE * rank + (STRIDE << 20) * step) % 2**63


def under_torchrun() -> bool:
    """True where torchrun started more than one process."""
    return all(name in os.environ for name in TORCHRUN) and int(os.environ["WORLD_SIZE"]) > 1


@contextmanager
def joined(training: TrainingConfig) -> Iterator[tuple[Team, TrainingConfig]]:
    """Join the processes that torchrun started, if it did, and leave them in good order.

    Args:
        training: The training section.

    Yields:
        The team, and the training section with the device of this process.

    Raises:
        ConfigError: The section cannot be used with so many processes.
        LostProcessError: In the body, another process was lost.
        FollowerError: In the body, all processes ended for a reason that the first one tells.
    """
    if not under_torchrun():
        yield Team(), training
        return
    import torch.distributed as dist

    from ultrazoo.train.parallel import Replicas, Shards

    rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    training = _own_device(training, local, size)
    on_gpu = training.device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(training.device)
    timeout = timedelta(seconds=training.distributed_timeout)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise LostProcessError(f"the processes cannot find each other: {error}") from error
    kind = Shards if training.distributed == "fsdp" else Replicas
    team = kind(rank, size, training)
    try:
        yield team, training
        team.barrier()
    except (StoppedError, NonFiniteError) as error:  # in all processes alike, or in the first alone
        if isinstance(error, StoppedError):
            team.barrier()
        if rank:
            raise FollowerError(error.exit_code) from error
        raise
    except RuntimeError as error:
        if not any(sign in str(error) for sign in LOST):
            raise
        text = str(error).strip().splitlines()[0][:160]
        raise LostProcessError(
            f"another process of the job is gone, or did not answer within "
            f"training.distributed_timeout {training.distributed_timeout} s ({text}); "
            "start the job again with --resume auto"
        ) from error
    finally:
        # a thread of gloo that still holds the last tensor it sent needs the interpreter to let go of it, and would
        # wait for ever for the thread that takes the group apart
        time.sleep(SETTLE_SECONDS)
        dist.destroy_process_group()


def _own_device(training: TrainingConfig, local: int, size: int) -> TrainingConfig:
    """The section with the device of this process in it.

    Raises:
        ConfigError: There is none for it, or fewer rows than processes.
    """
    if training.batch_size < size:
        raise ConfigError(
            f"training.batch_size: got {training.batch_size} with {size} processes; expected a row for each at least "
            "(batch_size counts the rows of all processes together); raise it, and lower gradient_accumulation_steps"
        )
    device = training.device
    if device == "mps" or ":" in device:
        raise ConfigError(
            f"training.device: got {device!r} with {size} processes, which cannot share it; expected auto, cuda or cpu"
        )
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"torchrun: process {local} of this machine has no GPU of its own among {torch.cuda.device_count()}; "
                "lower --nproc-per-node, or set training.device to cpu"
            )
        device = f"cuda:{local}"
    else:
        device = "cpu"
    return training.model_copy(update={"device": device})
