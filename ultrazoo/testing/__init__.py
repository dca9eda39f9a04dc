"""What blocks, ops and plugins are held to. Importing it loads no torch: pytest imports it in every project."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ultrazoo.testing.conformance_result import Task

__all__ = ["conformance_tests"]


def conformance_tests(
    target: str, *, quick: bool = False, options: Mapping[str, Mapping[str, Any]] | None = None
) -> Callable[[Task], None]:
    """Return a test function with one case for each check of a plugin, a block or an op; three lines of a test file::

        from ultrazoo.testing import conformance_tests

        test_conforms = conformance_tests("my_plugin")

    Args:
        target: A plugin or its distribution, a block, an op by its full name, or ``all``.
        quick: Leave out what is slow and checked in a smaller way too.
        options: Block -> fields of its config that the laws set; by default a block is built as small as it lets.

    Raises:
        ConfigError: The target is unknown, or ``options`` names a block that is not part of it.
    """
    from ultrazoo.testing import conformance

    return conformance.conformance_tests(target, quick=quick, options=options)
