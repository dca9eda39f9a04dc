"""What an op runs on a device, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ultrazoo.errors import UnknownNameError
from ultrazoo.ops import build, loader


@dataclass(frozen=True, kw_only=True)
class KernelStatus:
    """What an op runs on a device type under the ``auto`` policy."""

    op: str
    device: str
    compiled: bool
    backward_compiled: bool | None
    """None for an op without a backward op of its own."""
    detail: str
    """The library and instruction set, or the reason why there is no kernel."""
    fix: str


def of_op(name: str, device: str, ops: Mapping[str, Any]) -> KernelStatus:
    """Load the kernels of an op's library and tell which of them it has.

    Raises:
        UnknownNameError: The op is none of ``ops``.
    """
    if name not in ops:
        raise UnknownNameError("op", name, ops)
    op, backward_op = ops[name], ops.get(f"{name}_backward")
    loaded = loader.load(op.namespace)
    forward = op.has_kernel(device)
    backward = backward_op.has_kernel(device) if backward_op is not None else None
    compiled = forward and backward is not False
    lacks_cuda = _without_cuda(op.namespace) if device == "cuda" else None
    gpus = range(torch.cuda.device_count() if compiled and device == "cuda" else 0)
    unfit = [loader.lacks_code_for(op.namespace, index) for index in gpus]
    if unfit and all(unfit):
        compiled, detail = False, f"{loaded.path}: {unfit[0]}"
        fix = "unset TORCH_CUDA_ARCH_LIST, or name the GPU's own there, where nvcc is"
    elif compiled:
        detail, fix = f"{_code(op.namespace, device)}{loaded.path}", ""
    elif lacks_cuda is not None:
        detail, fix = lacks_cuda.reason, lacks_cuda.fix
    elif loaded.path:
        detail = f"{loaded.path} has no {device} kernel for {'its backward' if forward else 'it'}"
        fix = "use kernels: auto"
    else:
        detail, fix = loaded.reason, loaded.fix
    return KernelStatus(op=name, device=device, compiled=compiled, backward_compiled=backward, detail=detail, fix=fix)


def _without_cuda(namespace: str) -> build.BuildError | None:
    path = loader.load(namespace).path
    return build.without_cuda(path, loader.sources_of(namespace)) if path else None


def _code(namespace: str, device: str) -> str:
    """What the kernels of a device are compiled for."""
    if device == "cpu":
        return f"{loader.cpu_isa(namespace)}, "
    made = loader.cuda_kernels(namespace) if device == "cuda" else None
    return f"CUDA {made.nvcc} for {' '.join(made.archs)}, " if made else ""
