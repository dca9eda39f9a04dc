"""The operator libraries: how an op is defined, and which kernel runs when it is called.

``OpLibrary`` is a namespace of ops with their compiled kernels; ultrazoo's own is ``ultrazoo``, a plugin makes one for
itself (docs/plugin-kernels.md). To add the op ``foo`` to ultrazoo:

1. ``ops/foo/reference.py`` holds the mathematics in plain torch, forward and (for a differentiable op) backward.
2. ``ops/foo/op.py`` hands both to ``define``: first ``foo_backward(...)``, then ``foo(...)``, whose ``backward``
   formula calls ``ctx.backward_op(...)``, which is ``foo_backward`` of the same kind (kernel or reference) as the
   forward that ran. ``check`` takes the arguments of the schema and raises if they do not fit together. The file ends
   with the public function ``foo``, which calls the ``Op``, and with ``SPEC = OpSpec(name="ultrazoo::foo", ...)``.
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
import importlib.metadata
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ultrazoo.distributions import version_of
from ultrazoo.errors import KernelUnavailableError, PluginError
from ultrazoo.ops import dispatch, loader, policy, status
from ultrazoo.ops.build import BUILT_IN
from ultrazoo.ops.policy import Policy, get_kernel_policy, kernel_policy, set_kernel_policy
from ultrazoo.ops.status import KernelStatus

__all__ = [
    "KernelStatus",
    "Op",
    "OpLibrary",
    "Policy",
    "define",
    "get_kernel_policy",
    "kernel_policy",
    "kernel_status",
    "libraries",
    "library_of",
    "set_kernel_policy",
]

NAMESPACE = BUILT_IN
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Check = Callable[..., object]
log = logging.getLogger("ultrazoo")

_libraries: dict[str, OpLibrary] = {}
_ops: dict[str, Op] = {}
"""Every op by its full name."""
_announced: set[tuple[str, str, str, str | None]] = set()


class Op:
    """``namespace::name``; calling it runs the compiled kernel or the reference, as the kernel policy says."""

    def __init__(
        self,
        namespace: str,
        name: str,
        dtypes: tuple[torch.dtype, ...],
        typed: tuple[str, ...],
        check: Check | None,
        *,
        has_backward: bool,
    ) -> None:
        self.namespace, self.name, self.dtypes, self.check = namespace, name, dtypes, check
        self.has_backward = has_backward
        self.qualname = f"{namespace}::{name}"
        packet = getattr(getattr(torch.ops, namespace), name)
        self.default: Callable[..., Any] = packet.default
        self.reference: Callable[..., Any] = packet.reference
        names = [argument.name for argument in packet.default._schema.arguments]
        self._typed = (0, *map(names.index, typed))

    def __call__(self, *args: Any) -> Any:
        if self.check is not None:
            self.check(*args)
        lead: torch.Tensor = args[0]
        unfit = dispatch.unfit(self.dtypes, [args[index] for index in self._typed])
        if not unfit and lead.is_cuda and not torch.compiler.is_compiling():
            unfit = loader.lacks_code_for(self.namespace, lead.get_device())
        by_reference = policy.current == "reference" or bool(unfit)
        if by_reference and policy.current == "compiled":
            raise KernelUnavailableError(
                f"{self.qualname}: no compiled kernel for these inputs: {unfit}; use kernels: auto, or other inputs"
            )
        if not torch.compiler.is_compiling():
            self.prepare(lead.device.type, unfit if by_reference else None)
        return (self.reference if by_reference else self.default)(*args)

    def has_kernel(self, device: str) -> bool:
        """True when a compiled kernel (not just the reference) is registered for a device type."""
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(self.qualname, device.upper()))

    def prepare(self, device: str, unfit: str | None = None) -> None:
        """Load the kernels, and say once what this op runs on this device type and why.

        Args:
            device: Type of the device.
            unfit: The reference runs: why the kernels do not take the inputs, "" if it was asked for. None: they do.

        Raises:
            KernelUnavailableError: the policy is ``compiled`` and the op or its backward has no kernel.
        """
        key = (self.qualname, device, policy.current, unfit)
        if key in _announced or device == "meta":
            return
        where = f"kernels: {self.qualname} on {device}"
        if unfit is not None:
            asked = get_kernel_policy() == "reference"
            level = logging.WARNING if device == "cuda" and unfit and not asked else logging.INFO
            log.log(level, "%s runs the reference: %s", where, "asked for" if asked else unfit)
        else:
            found = kernel_status(self.qualname, device)
            if not found.compiled and policy.current == "compiled":
                raise KernelUnavailableError(f"{where}: compiled was asked for, but {found.detail}; {found.fix}")
            if found.compiled:
                log.info("%s runs compiled: %s", where, found.detail)
            elif not _libraries[self.namespace].has_sources:
                log.info("%s runs the reference: %s", where, found.detail)
            elif loader.load(self.namespace).path is None:
                _warn_without_library(self.namespace, found.detail, found.fix)
            elif device == "cuda" and loader.cuda_kernels(self.namespace) is None:
                _warn_without_library(self.namespace, found.detail, found.fix, " on cuda")
            else:
                log.warning("%s runs the reference: %s", where, found.detail)
        _announced.add(key)


@functools.cache
def _warn_without_library(namespace: str, reason: str, fix: str, where: str = "") -> None:
    """One line, however many ops ask."""
    log.warning("kernels: every op of %s runs its reference%s: %s; %s", namespace, where, reason, fix)


class OpLibrary:
    """The ops of one namespace, with the kernels that are compiled for them.

    The kernels are found or built when an op is first called, and loaded into the process beside those of the other
    libraries. Where that fails, the ops run their references, and one warning says why and what to do.
    """

    def __init__(self, namespace: str, *, sources: Path | str | None = None) -> None:
        """Make a library.

        Args:
            namespace: Of the ops, such as ``gla`` for ``gla::chunk``; no other distribution may use it.
            sources: Folder of kernel sources, laid out as ultrazoo's csrc/ is; None: the ops have references alone.

        Raises:
            PluginError: The namespace is no identifier, or another distribution uses it.
        """
        self.namespace = namespace
        self.owner = str(sys._getframe(1).f_globals.get("__name__", "unknown"))
        """The module that made the library."""
        self.sources = Path(sources) if sources is not None else None
        if not re.fullmatch(r"[a-z][a-z0-9_]*", namespace):
            raise PluginError(f"{self.origin}: op namespace: got {namespace!r}, expected small letters, digits and _")
        before = _libraries.get(namespace)
        if before is not None and before.owner != self.owner:
            cure = "uninstall one of them, or give its ops another namespace"
            if before.owner.partition(".")[0] == self.owner.partition(".")[0]:
                cure = "make one OpLibrary, and import it in the other module"
            raise PluginError(
                f"op namespace {namespace!r} belongs to {before.origin}; {self.origin} wants it too: {cure}"
            )
        if before is not None:
            raise PluginError(
                f"{self.origin}: op namespace {namespace!r} is made a second time in this process, and torch cannot "
                "define ops anew: make one OpLibrary at the top of a module, and start Python again after an edit"
            )
        if any(name.startswith(f"{namespace}::") for name in torch._C._dispatch_get_all_op_names()):
            raise PluginError(
                f"{self.origin}: op namespace {namespace!r} has ops of another library; take another name"
            )
        if namespace != BUILT_IN:
            loader.declare(namespace, self.sources)
        self._torch_library = dispatch.Library(namespace, "FRAGMENT")
        _libraries[namespace] = self

    @property
    def has_sources(self) -> bool:
        """True when there are kernels to compile."""
        return self.sources is not None or self.namespace == BUILT_IN

    @property
    def ops(self) -> dict[str, Op]:
        """The ops, by full name, backwards included."""
        return {name: op for name, op in _ops.items() if op.namespace == self.namespace}

    @property
    def origin(self) -> str:
        """The distribution whose module made the library, as error messages name it."""
        package = self.owner.partition(".")[0]
        names = filter(None, importlib.metadata.packages_distributions().get(package, ()))  # None: without METADATA
        found = " or ".join(f"{name} {version_of(name)}" for name in sorted(set(names)))
        return f"{found} (module {self.owner})" if found else f"module {self.owner}"

    def forget(self) -> None:
        """Take the library and its ops out of torch, for good: torch may crash when they are defined again."""
        for name in self.ops:
            del _ops[name]
        self._torch_library._destroy()
        del _libraries[self.namespace]

    def define(
        self,
        schema: str,
        reference: Callable[..., Any],
        *,
        fake: Callable[..., Any],
        setup_context: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
        backward: Callable[..., Any] | None = None,
        dtypes: tuple[torch.dtype, ...] = KERNEL_DTYPES,
        typed: tuple[str, ...] = (),
        check: Check | None = None,
    ) -> Op:
        """Define ``namespace::<schema>`` and its twin, with the reference as the default kernel of both.

        Args:
            schema: For example ``"foo(Tensor x, float a) -> Tensor"``.
            reference: Computes the op in plain torch, for any device and dtype.
            fake: Returns empty outputs of the right shape, dtype and strides.
            setup_context: ``(ctx, inputs, output)``, saves what ``backward`` needs.
            backward: ``(ctx, *grads)``, returns one gradient per argument of the schema (None where there is none);
                ``ctx.backward_op`` is the op ``<name>_backward``, if defined, of the kind that ran forward. Without
                one, differentiating the op is an error.
            dtypes: Dtypes of the first argument that compiled kernels take; others run the reference.
            typed: Names of further arguments that compiled kernels take in ``dtypes`` alone.
            check: Takes the arguments of the schema and raises if they do not fit together. It runs before the
                reference, ``fake`` and any call of the ``Op``; kernels check their arguments themselves.

        Raises:
            PluginError: The schema names an op of another namespace.
        """
        name, _, arguments = schema.partition("(")
        if "::" in name:
            raise PluginError(f"{self.origin}: got schema {schema!r}, expected a name without namespace: it is given")
        for full_name in (name, f"{name}.reference"):
            self._torch_library.define(f"{full_name}({arguments}", tags=(torch.Tag.pt2_compliant_tag,))
        op = _ops[f"{self.namespace}::{name}"] = Op(
            self.namespace, name, dtypes, typed, check, has_backward=backward is not None
        )
        reference, fake = dispatch.checked(check, reference), dispatch.checked(check, fake)

        def default_kernel(*args: Any) -> Any:
            device = args[0].device.type
            had_kernel = op.has_kernel(device)
            op.prepare(device)
            if op.has_kernel(device) and not had_kernel:  # loaded just now: take it
                return op.default(*args)
            return reference(*args)

        for full_name, kind, kernel in (
            (name, "default", default_kernel),
            (f"{name}.reference", "reference", reference),
        ):
            dispatch.register(
                *(self._torch_library, full_name, kernel),
                fake=fake,
                setup_context=setup_context,
                backward=backward,
                backward_op=functools.partial(_backward_of, op.qualname, kind),
            )
        return op


def _backward_of(name: str, kind: str) -> Callable[..., Any] | None:
    return getattr(_ops.get(f"{name}_backward"), kind, None)


def libraries() -> dict[str, OpLibrary]:
    """Return every library made in this process, by namespace: ultrazoo's and those of the plugins that are loaded."""
    return dict(_libraries)


def library_of(op: str) -> OpLibrary | None:
    """Return the library that defined an op, by its full name; None for an op that none defined."""
    return _libraries[_ops[op].namespace] if op in _ops else None


def kernel_status(op: str, device: str) -> KernelStatus:
    """Load the kernels and tell which of them an op, such as ``"ultrazoo::retention"``, has on a device type.

    Raises:
        UnknownNameError: No library has that op.
    """
    get_kernel_policy()  # a wrong ULTRAZOO_KERNELS is an error here, before a build
    return status.of_op(op if "::" in op else f"{BUILT_IN}::{op}", device, _ops)


define = OpLibrary(BUILT_IN).define
