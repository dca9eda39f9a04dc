"""Training: the loop, optimisers, checkpoints, metrics and health; ``train`` is imported when it is first named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ultrazoo.train.run import train

__all__ = ["train"]


def __getattr__(name: str) -> Any:
    if name != "train":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ultrazoo.train.run import train

    return train
