"""Names of devices."""

from __future__ import annotations

import re

PATTERN = "(auto|cpu|mps|cuda(:[0-9]+)?)"


def require_device(name: str) -> str:
    """Return the name of a device.

    Raises:
        ValueError: No device is called so.
    """
    if not re.fullmatch(PATTERN, name):
        raise ValueError(
            f"got {name!r}, expected one of auto, cpu, cuda, cuda:N, mps; a GPU is cuda, or mps on an Apple computer"
        )
    return name
