"""Memory that runs out becomes one line with a way out, whatever allocator says so and however."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ultrazoo.errors import UltrazooError

SIGNS = ("not enough memory", "can't allocate memory", "out of memory", "bad_alloc", "Cannot allocate memory")


class OutOfMemoryError(UltrazooError):
    """The machine, or the limit set for the process, has no more memory."""


@contextmanager
def memory_told(last_checkpoint: Callable[[], Path | None] = lambda: None) -> Iterator[None]:
    """Turn the many forms of a failed allocation into one error.

    Args:
        last_checkpoint: Where the run can go on from.

    Raises:
        OutOfMemoryError: Memory ran out in the body.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and not any(sign in str(error) for sign in SIGNS):
            raise
        checkpoint = last_checkpoint()
        saved = f"; last good checkpoint: {checkpoint}, continue with --resume auto" if checkpoint else ""
        raise OutOfMemoryError(
            f"out of memory: {text[:200]}; lower training.batch_size (and raise gradient_accumulation_steps), "
            f"training.max_length or the model's size{saved}"
        ) from error
