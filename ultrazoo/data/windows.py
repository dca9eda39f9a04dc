"""Window number -> packed rows, in this process or in workers; the order is the plan's for any number of workers."""

from __future__ import annotations

import atexit
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from multiprocessing import get_all_start_methods
from typing import Any

import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from ultrazoo.data.packing import Frame, pack
from ultrazoo.data.plan import EpochPlan, Plan
from ultrazoo.data.stores import Reading, Store
from ultrazoo.errors import DataError

Index = tuple[int, int]
MAIN_ONLY = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
"""Signals that a whole process group gets and that only the main process acts on."""


@dataclass(frozen=True)
class Window:
    """The packed rows of window ``index`` of an epoch: tokens and segments, both (rows, L); and what was skipped.

    ``damage`` names the row groups, and their damage, that hides rows of the window.
    """

    epoch: int
    index: int
    tokens: NDArray[Any]
    segments: NDArray[Any]
    skipped: Counter[str]
    num_tokens: int
    bytes: int
    damage: dict[str, str]


@dataclass(frozen=True)
class Failure:
    """An error's text, brought from a worker without its traceback."""

    text: str


@dataclass
class WindowDataset(Dataset[Window | Failure]):
    """Reads, tokenises and packs window ``(epoch, index)``; a function of its fields and that pair alone."""

    plan: Plan
    store: Store
    frame: Frame
    packed: bool
    _epochs: dict[int, EpochPlan] = field(default_factory=dict, init=False, repr=False)

    def epoch_plan(self, epoch: int) -> EpochPlan:
        """Return an epoch's plan; the last two are kept."""
        if epoch not in self._epochs:
            while len(self._epochs) > 1:
                self._epochs.pop(next(iter(self._epochs)))
            self._epochs[epoch] = self.plan.epoch(epoch)
        return self._epochs[epoch]

    def read(self, index: Index) -> Reading:
        """Return the window's training documents, not packed.

        Raises:
            DataError: The data cannot be read.
        """
        epoch, window = index
        return self.store.read(self.epoch_plan(epoch).spans(window), held_out=False)

    def __getitem__(self, index: Index) -> Window | Failure:
        try:
            reading = self.read(index)
        except DataError as error:
            return Failure(str(error))
        key = (self.plan.seed, *index) if self.plan.shuffle else None
        tokens, segments = pack(reading.documents, self.frame, packed=self.packed, key=key)
        count = int(reading.documents.lengths.sum())
        return Window(*index, tokens, segments, reading.skipped, count, reading.bytes, reading.damage)


class _FromPosition(Sampler[Index]):
    """Windows in order from a position on, epoch after epoch, without end."""

    def __init__(self, dataset: WindowDataset, epoch: int, window: int) -> None:
        self.dataset, self.epoch, self.window = dataset, epoch, window

    def __iter__(self) -> Iterator[Index]:
        epoch, window = self.epoch, self.window
        while True:
            for index in range(window, len(self.dataset.epoch_plan(epoch))):
                yield epoch, index
            epoch, window = epoch + 1, 0


def _init_worker(_: int) -> None:
    """Leave signals to the main process, which ends its workers itself; no thread pool of tokenizers."""
    for name in MAIN_ONLY:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process soon after its parent is gone; else it could wait for ever to hand over its last window."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _same(item: Any) -> Any:
    return item


def _start(loader: DataLoader[Any]) -> Iterator[Any]:
    """Start the workers, and take back the signal handler that would raise in the middle of a step when one dies.

    The loader notices a dead worker by itself, when its window is due.
    """
    before = signal.getsignal(signal.SIGCHLD)
    if before is None or threading.current_thread() is not threading.main_thread():
        return iter(loader)
    try:
        return iter(loader)
    finally:
        signal.signal(signal.SIGCHLD, before)


def iterate(dataset: WindowDataset, epoch: int, window: int, *, workers: int, seed: int) -> Generator[Window]:
    """Yield windows from a position on, prepared by ``workers`` processes (0: here).

    Raises:
        DataError: The data cannot be read, or a worker died.
    """
    forked = workers > 0 and "fork" in get_all_start_methods()
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=_FromPosition(dataset, epoch, window),
        num_workers=workers,
        collate_fn=_same,
        worker_init_fn=_init_worker,
        multiprocessing_context="fork" if forked else None,
        generator=torch.Generator().manual_seed(seed & 0x7FFFFFFF),
    )
    windows = _start(loader)
    stop = getattr(windows, "_shutdown_workers", None)
    if stop is not None:
        # before multiprocessing's own exit handler, which waits for workers that SIGTERM cannot end
        atexit.register(stop)
    try:
        while True:
            try:
                item = next(windows)
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise DataError(
                    f"training.dataloader_workers: {str(error).splitlines()[0]}; expected workers that live as long "
                    "as the run; perhaps memory ran out: resume with fewer workers or a smaller dataset_batch_size"
                ) from error
            if isinstance(item, Failure):
                raise DataError(item.text)
            yield item
    finally:
        if stop is not None:
            stop()
            atexit.unregister(stop)
