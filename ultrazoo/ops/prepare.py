"""Gets kernels ready before anything is timed."""

from __future__ import annotations

from collections.abc import Iterable

from ultrazoo.ops import loader
from ultrazoo.ops.build import BUILT_IN
from ultrazoo.ops.library import libraries, library_of
from ultrazoo.ops.policy import get_kernel_policy
from ultrazoo.spec import BlockSpec


def prepare(ops: Iterable[str] = (), packages: Iterable[str] = ()) -> None:
    """Load the kernels that a piece of work needs, and compile those that are missing, with a line of progress.

    An op does the same at its first call; to call this first keeps that time out of what is measured, and out of time
    limits. Under the policy ``reference`` nothing is loaded. Where there can be no kernels the ops run their
    references, and say so at their first call.

    Args:
        ops: Full names of ops, such as ``ultrazoo::retention``; those that no ``OpLibrary`` defines are ignored.
        packages: Names of top-level packages: every library that a module of theirs made.
    """
    if get_kernel_policy() == "reference":
        return
    owners = set(packages)
    wanted = {library.namespace for op in ops if (library := library_of(op)) is not None}
    wanted |= {name for name, library in libraries().items() if library.owner.partition(".")[0] in owners}
    prepare_libraries(wanted)


def prepare_libraries(namespaces: Iterable[str]) -> None:
    """Get the kernels of op libraries ready, whatever the policy is."""
    for namespace in sorted(namespaces):
        loader.load(namespace)


def prepare_blocks(blocks: Iterable[BlockSpec]) -> None:
    """Get the kernels of a model ready: those of ultrazoo, of the ops that its blocks name, and of their packages."""
    blocks = list(blocks)
    packages = {block.config.__module__.partition(".")[0] for block in blocks}
    prepare([op for block in blocks for op in block.ops], {BUILT_IN, *packages})
