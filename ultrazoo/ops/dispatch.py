"""What surrounds every kernel of an op in torch's dispatcher: autocast is off, and forward-mode AD is refused.

A kernel, a reference and a gradient formula call operators of torch. Under ``torch.autocast`` these would change dtypes
behind the kernel's back, so each op excludes autocast for all that runs below it, whatever device it runs on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_AUTOCAST = [name for name in torch._C.DispatchKey.__members__ if name.startswith("Autocast")]
_AUTOCAST_SET = functools.reduce(
    lambda keys, name: keys | torch._C.DispatchKeySet(torch._C.DispatchKey.__members__[name]),
    _AUTOCAST,
    torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined),
)


class Library(torch.library.Library):
    """Torch's library, whose autograd kernels refuse the tangents of forward-mode AD."""

    def impl(self, op_name: Any, fn: Callable[..., Any], dispatch_key: str = "", **options: Any) -> None:
        """Register a kernel; ``torch.library.register_autograd`` calls this for the key Autograd."""
        if dispatch_key == "Autograd":
            fn = _reverse_mode_only(f"{self.ns}::{op_name}", fn)
        super().impl(op_name, fn, dispatch_key, **options)


def register(
    library: Library,
    name: str,
    kernel: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None] | None,
    backward: Callable[..., Any] | None,
    backward_op: Callable[[], Any],
) -> None:
    """Register the default kernel of an op and all that surrounds it.

    Args:
        library: Where the op is defined.
        name: Of the op, with its overload and without its namespace.
        kernel: Runs where no compiled kernel does.
        fake: Returns empty outputs.
        setup_context: Saves what ``backward`` needs.
        backward: The gradient formula; None: a clear error instead.
        backward_op: Returns what the formula finds in ``ctx.backward_op``, or None.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.backward_op = backward_op()
        if setup_context is not None:
            setup_context(ctx, inputs, output)

    full_name = f"{library.ns}::{name}"
    op = _overload(full_name)
    library.impl(name, kernel, "CompositeExplicitAutograd")
    for key in _AUTOCAST:
        library.impl(name, without_autocast(op), key)
    torch.library.register_fake(full_name, fake, lib=library)
    formula = without_autocast(backward) if backward is not None else _no_derivative(full_name)
    torch.library.register_autograd(full_name, formula, setup_context=setup, lib=library)


def unfit(dtypes: tuple[torch.dtype, ...], tensors: list[Tensor | None]) -> str:
    """Return why kernels for some dtypes do not take all of the tensors; empty if they do."""
    for x in tensors:
        if x is not None and x.dtype not in dtypes:
            return f"the kernels take {dtypes}, not {x.dtype}"
    return ""


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function that calls another one with autocast excluded from dispatch, on every kind of device."""

    def call(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_SET):
            return function(*args)

    return call


def checked(check: Callable[..., object] | None, function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function that checks its arguments first."""
    if check is None:
        return function

    def call(*args: Any) -> Any:
        check(*args)
        return function(*args)

    return call


def _overload(full_name: str) -> Any:
    namespace, _, name = full_name.partition("::")
    name, _, overload = name.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), name), overload or "default")


def _reverse_mode_only(full_name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse what torch would get wrong, or would explain by its internals, before the kernel for autograd runs."""

    def call(keyset: Any, *args: Any) -> Any:
        for x in args:
            if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
                raise NotImplementedError(
                    f"{full_name}: got a tangent of forward-mode AD (torch.func.jvp, torch.autograd.forward_ad), which "
                    "this op does not support; use reverse mode (torch.autograd.grad)"
                )
        if torch._C._are_functorch_transforms_active() and torch.is_grad_enabled() and _any_requires_grad(args):
            raise NotImplementedError(
                f"{full_name}: got a call within torch.func.grad, vjp or jacrev, which this op does not support; use "
                "torch.autograd.grad"
            )
        return kernel(keyset, *args)

    return call


def _any_requires_grad(args: tuple[Any, ...]) -> bool:
    return any(isinstance(x, Tensor) and x.requires_grad for x in args)


def _no_derivative(full_name: str) -> Callable[..., Any]:
    name = full_name.partition(".")[0]

    def formula(ctx: Any, *grads: Any) -> Any:
        if name.endswith("_backward"):
            first = name.removesuffix("_backward")
            raise NotImplementedError(f"{first} has no second derivative; call backward without create_graph")
        raise NotImplementedError(f"{name} has no derivative; detach its inputs, or call it under torch.no_grad()")

    return formula
