"""Pytest's side of the conformance kit: ``pytest --ultrazoo-blocks=my_plugin`` adds a test for each check.

Pytest imports this module in every project of an environment that has ultrazoo: it imports nothing but pytest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from ultrazoo.testing.conformance_result import Task


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("ultrazoo", "ultrazoo's conformance kit")
    group.addoption(
        "--ultrazoo-blocks",
        action="append",
        default=[],
        metavar="NAME",
        help="hold a plugin, a block, an op or all of them to the conformance kit; names by commas, may be repeated",
    )
    group.addoption("--ultrazoo-quick", action="store_true", help="leave out what is slow, as ultrazoo check --quick")


@pytest.hookimpl(tryfirst=True)  # before -k and -m choose
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add the checks to the tests of the session.

    Raises:
        UsageError: A name is unknown.
    """
    wanted = [name.strip() for given in config.getoption("ultrazoo_blocks") for name in given.split(",")]
    for name in dict.fromkeys(filter(None, wanted)):
        items.extend(Target.from_parent(session, name=f"ultrazoo[{name}]", target=name).collect())


class Target(pytest.Collector):
    """The checks of one name; they belong to no file."""

    def __init__(self, *, target: str, name: str, parent: pytest.Session, **settings: Any) -> None:
        super().__init__(name, parent, nodeid=name, **settings)
        self.target = target

    def collect(self) -> Iterator[ConformanceItem]:
        """Yield a test for each check.

        Raises:
            UsageError: The name is unknown.
        """
        from ultrazoo.errors import UltrazooError
        from ultrazoo.testing.conformance import plan

        try:
            tasks = plan(self.target, quick=self.config.getoption("ultrazoo_quick"))
        except UltrazooError as error:
            raise pytest.UsageError(f"--ultrazoo-blocks: {error}") from error
        for task in tasks:
            yield ConformanceItem.from_parent(self, name=task.id, task=task)


class ConformanceItem(pytest.Item):
    """One check of one subject."""

    def __init__(self, *, task: Task, name: str, parent: Target, **settings: Any) -> None:
        super().__init__(name, parent, **settings)
        self.task = task

    def runtest(self) -> None:
        """Measure; a check that does not apply is a skip."""
        result = self.task.hold()
        self.user_properties.append(("ultrazoo", f"{result.figures} {result.what}".strip()))
        if result.state == "not applicable":
            pytest.skip(result.what)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Tell what was got and expected; no traceback, for the kit is not at fault."""
        from ultrazoo.testing.conformance_result import ConformanceFailure

        if isinstance(excinfo.value, ConformanceFailure):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Where the report says that the test is."""
        return self.path, None, f"{self.task.kind} {self.task.subject}: {self.task.check}"
