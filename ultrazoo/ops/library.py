"""The operator library: how an op is defined, and which kernel runs when it is called.

To add the op ``foo``:

1. ``ops/foo/reference.py`` holds the mathematics in plain torch, forward and (for a differentiable op) backward.
2. ``ops/foo/op.py`` hands both to ``define``: first ``foo_backward(...)``, then ``foo(...)``, whose ``backward``
   formula calls ``ctx.backward_op(...)``, which is ``foo_backward`` of the same kind (kernel or reference) as the
   forward that ran. It ends with the public function ``foo``, which checks its arguments and calls the ``Op``, and
   with ``SPEC = OpSpec(name="ultrazoo::foo", ...)``.
3. ``ops/__init__.py`` lists the public function.
4. ``csrc/foo/`` holds the compiled kernels (see csrc/README.md); nothing changes in Python when they arrive.

Rules for a schema: the first argument is the tensor whose device and dtype decide; no defaults and no keyword-only
arguments (those belong to the public function); outputs never alias inputs; output dtypes, shapes and strides follow
from the arguments alone, because ``fake`` must predict them.

Every op exists twice: ``ultrazoo::foo``, on which compiled kernels are registered and whose default kernel is the
reference, and its twin ``ultrazoo::foo.reference``, which never has another kernel. The kernel policy says which of
the two a call takes, so autograd, ``torch.compile`` and threads need to know nothing about it.

``torch.compile`` keeps graphs on disk and does not notice that an autograd formula has changed: after editing one, run
with TORCHINDUCTOR_FORCE_DISABLE_CACHES=1.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from ultrazoo.errors import ConfigError, KernelUnavailableError, UnknownNameError, did_you_mean
from ultrazoo.ops import build, loader

Policy = Literal["auto", "compiled", "reference"]
NAMESPACE = "ultrazoo"
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
log = logging.getLogger("ultrazoo")

_policy: str = os.environ.get("ULTRAZOO_KERNELS") or "auto"
_torch_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_ops: dict[str, Op] = {}
_announced: set[tuple[str, str, str, bool]] = set()


class Op:
    """``ultrazoo::name``; calling it runs the compiled kernel or the reference, as the kernel policy says."""

    def __init__(self, name: str, dtypes: tuple[torch.dtype, ...]) -> None:
        self.name = name
        self.qualname = f"{NAMESPACE}::{name}"
        self.dtypes = dtypes
        packet = getattr(getattr(torch.ops, NAMESPACE), name)
        self.default: Callable[..., Any] = packet.default
        self.reference: Callable[..., Any] = packet.reference

    def __call__(self, *args: Any) -> Any:
        lead: torch.Tensor = args[0]
        by_reference = _policy == "reference" or lead.dtype not in self.dtypes
        if by_reference and _policy == "compiled":
            raise KernelUnavailableError(
                f"{self.qualname}: no compiled kernel for {lead.dtype}, expected one of {self.dtypes}; "
                "use kernels: auto, or another dtype"
            )
        if not torch.compiler.is_compiling():
            self.prepare(lead.device.type, by_reference)
        return (self.reference if by_reference else self.default)(*args)

    def has_kernel(self, device: str) -> bool:
        """True when a compiled kernel (not just the reference) is registered for a device type."""
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(self.qualname, device.upper()))

    def prepare(self, device: str, by_reference: bool = False) -> None:
        """Load the kernels, and say once what this op runs on this device type and why.

        Raises:
            KernelUnavailableError: the policy is ``compiled`` and the op or its backward has no kernel.
        """
        key = (self.name, device, _policy, by_reference)
        if key in _announced or device == "meta":
            return
        where = f"kernels: {self.qualname} on {device}"
        if by_reference:
            why = "asked for" if get_kernel_policy() == "reference" else f"the kernels take {self.dtypes}"
            log.info("%s runs the reference: %s", where, why)
        else:
            status = kernel_status(self.name, device)
            if not status.compiled and _policy == "compiled":
                raise KernelUnavailableError(f"{where}: compiled was asked for, but {status.detail}; {status.fix}")
            if status.compiled:
                log.info("%s runs compiled: %s", where, status.detail)
            elif loader.load().path is None:
                _warn_without_library(status.detail, status.fix)
            elif device == "cuda" and loader.cuda_kernels() is None:
                _warn_without_library(status.detail, status.fix, " on cuda")
            else:
                log.warning("%s runs the reference: %s", where, status.detail)
        _announced.add(key)


@functools.cache
def _warn_without_library(reason: str, fix: str, where: str = "") -> None:  # one line, however many ops ask
    log.warning("kernels: every op runs its reference%s: %s; %s", where, reason, fix)


def define(
    schema: str,
    reference: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
    backward: Callable[..., Any] | None = None,
    dtypes: tuple[torch.dtype, ...] = KERNEL_DTYPES,
) -> Op:
    """Define ``ultrazoo::<schema>`` and its twin, with the reference as the default kernel of both.

    Args:
        schema: For example ``"foo(Tensor x, float a) -> Tensor"``.
        reference: Computes the op in plain torch, for any device and dtype.
        fake: Returns empty outputs of the right shape, dtype and strides.
        setup_context: ``(ctx, inputs, output)``, saves what ``backward`` needs.
        backward: ``(ctx, *grads)``, returns one gradient per argument of the schema (None where there is none);
            ``ctx.backward_op`` is the op ``<name>_backward``, if defined, of the kind that ran forward.
        dtypes: Dtypes of the first argument that compiled kernels take; others run the reference.
    """
    name, arguments = schema.split("(", 1)
    for full_name in (name, f"{name}.reference"):
        _torch_library.define(f"{full_name}({arguments}", tags=(torch.Tag.pt2_compliant_tag,))
    op = _ops[name] = Op(name, dtypes)

    def default_kernel(*args: Any) -> Any:
        device = args[0].device.type
        had_kernel = op.has_kernel(device)
        op.prepare(device)
        if op.has_kernel(device) and not had_kernel:  # loaded just now: take it
            return op.default(*args)
        return reference(*args)

    _torch_library.impl(name, default_kernel, "CompositeExplicitAutograd")
    _torch_library.impl(f"{name}.reference", reference, "CompositeExplicitAutograd")
    for full_name, kind in ((name, "default"), (f"{name}.reference", "reference")):
        torch.library.register_fake(f"{NAMESPACE}::{full_name}", fake, lib=_torch_library)
        if backward is not None:
            torch.library.register_autograd(
                f"{NAMESPACE}::{full_name}",
                backward,
                setup_context=_with_backward_op(setup_context, f"{name}_backward", kind),
                lib=_torch_library,
            )
    return op


def _with_backward_op(
    setup_context: Callable[[Any, tuple[Any, ...], Any], None] | None, backward_name: str, kind: str
) -> Callable[..., None]:
    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if backward_name in _ops:
            ctx.backward_op = getattr(_ops[backward_name], kind)
        if setup_context is not None:
            setup_context(ctx, inputs, output)

    return setup


def set_kernel_policy(policy: str | None) -> None:
    """Choose the kernels of every later call; None goes back to ``ULTRAZOO_KERNELS``, or else to ``auto``."""
    global _policy
    _policy = _checked(policy or os.environ.get("ULTRAZOO_KERNELS") or "auto", "kernels")


def get_kernel_policy() -> str:
    """Return the policy in force."""
    return _checked(_policy, "ULTRAZOO_KERNELS")


@contextmanager
def kernel_policy(policy: Policy) -> Iterator[None]:
    """Run a block under another kernel policy; a backward follows the forward that it belongs to."""
    before = _policy
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


def _code(device: str) -> str:
    """What the kernels of a device are compiled for."""
    if device == "cpu":
        return f"{loader.cpu_isa()}, "
    made = loader.cuda_kernels() if device == "cuda" else None
    return f"CUDA {made.nvcc} for {' '.join(made.archs)}, " if made else ""


def kernel_status(op: str, device: str) -> KernelStatus:
    """Load the kernels and tell which of them an op, such as ``"ultrazoo::retention"``, has on a device type."""
    get_kernel_policy()  # a wrong ULTRAZOO_KERNELS is an error here, before a build
    name = op.removeprefix(f"{NAMESPACE}::")
    if name not in _ops:
        raise UnknownNameError("op", op, (f"{NAMESPACE}::{known}" for known in _ops))
    loaded = loader.load()
    forward = _ops[name].has_kernel(device)
    backward = _ops[f"{name}_backward"].has_kernel(device) if f"{name}_backward" in _ops else None
    lacks_cuda = build.without_cuda(loaded.path) if device == "cuda" and loaded.path else None
    if forward and backward is not False:
        detail, fix = f"{_code(device)}{loaded.path}", ""
    elif lacks_cuda is not None:
        detail, fix = lacks_cuda.reason, lacks_cuda.fix
    elif loaded.path:
        detail = f"{loaded.path} has no {device} kernel for {'its backward' if forward else 'it'}"
        fix = "use kernels: auto"
    else:
        detail, fix = loaded.reason, loaded.fix
    return KernelStatus(
        op=f"{NAMESPACE}::{name}",
        device=device,
        compiled=forward and backward is not False,
        backward_compiled=backward,
        detail=detail,
        fix=fix,
    )
