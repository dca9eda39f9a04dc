"""The kernel policy: whether calls of ops take compiled kernels or references."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from ultrazoo.errors import ConfigError, did_you_mean

Policy = Literal["auto", "compiled", "reference"]

current: str = os.environ.get("ULTRAZOO_KERNELS") or "auto"
"""As given; ``get_kernel_policy`` checks it."""


def set_kernel_policy(policy: str | None) -> None:
    """Choose the kernels of every later call; None goes back to ``ULTRAZOO_KERNELS``, or else to ``auto``."""
    global current
    current = _checked(policy or os.environ.get("ULTRAZOO_KERNELS") or "auto", "kernels")


def get_kernel_policy() -> str:
    """Return the policy in force."""
    return _checked(current, "ULTRAZOO_KERNELS")


@contextmanager
def kernel_policy(policy: Policy) -> Iterator[None]:
    """Run a block under another kernel policy; a backward follows the forward that it belongs to."""
    before = current
    set_kernel_policy(policy)
    try:
        yield
    finally:
        set_kernel_policy(before)


def _checked(policy: str, where: str) -> str:
    if policy not in get_args(Policy):
        raise ConfigError(
            f"{where}: got {policy!r}, expected one of {', '.join(get_args(Policy))}; "
            f"{did_you_mean(policy, get_args(Policy))}".rstrip("; ")
        )
    return policy
