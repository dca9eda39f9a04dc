"""The conformance kit: everything that a block, an op, a preset or a whole plugin is held to.

``plan`` lists the checks of a target, each a ``Task`` that runs alone; ``ultrazoo check``, the pytest plugin and
``conformance_tests`` run the same list. docs/conformance.md says what each check means.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ultrazoo.errors import ArgumentTypeError, ConfigError, UnknownNameError
from ultrazoo.plugins import Plugin
from ultrazoo.registry import registry
from ultrazoo.spec import BlockSpec, OpSpec
from ultrazoo.testing import conformance_block as blocks
from ultrazoo.testing import conformance_parts as parts
from ultrazoo.testing.conformance_parts import SAMPLES
from ultrazoo.testing.conformance_result import ConformanceFailure, Finding, Result, Task

__all__ = ["ConformanceFailure", "Finding", "Result", "Task", "conformance_tests", "plan", "plugins_of"]

Options = Mapping[str, Mapping[str, Any]]


def plan(target: str, *, quick: bool = False, options: Options | None = None) -> list[Task]:
    """List the checks of a target, in an order that is the same in every process.

    Args:
        target: A plugin or its distribution, a block, an op by its full name, or ``all``. A name that is both is the
            plugin.
        quick: Leave out what is slow and checked in a smaller way too.
        options: Block -> fields of its config that the laws set; by default a block is built as small as it lets.

    Raises:
        ConfigError: The target is unknown, or ``options`` names a block that is not part of it.
        PluginError: Two plugins offer the block.
        ArgumentTypeError: The target is no str.
    """
    if not isinstance(target, str):
        raise ArgumentTypeError(f"target: got {target!r}, expected the name of a plugin, block or op")
    zoo = registry()
    options = options or {}
    chosen = plugins_of(target)
    if chosen:
        tasks = [task for plugin in chosen for task in _of_plugin(plugin, quick, options)]
    elif target in zoo.ops():
        home = next(plugin for plugin in zoo.plugins if any(op.name == target for op in plugin.ops))
        tasks = list(_of_op(home, zoo.op(target), quick))
    else:
        spec = _find_block(target)
        home = zoo.home_of(spec.name)
        tasks = list(_of_block(home, spec, quick, options))
        for name in spec.ops:
            tasks += _of_op(home, zoo.op(name), quick)
    stray = set(options) - {task.subject for task in tasks}
    if stray:
        raise ConfigError(f"options: got the blocks {', '.join(sorted(stray))}, which are not part of {target}")
    return tasks


def plugins_of(target: str) -> list[Plugin]:
    """Return the plugins that a target names; none if it names a block or an op, all that are not disabled for ``all``.

    Raises:
        ConfigError: The plugin is disabled.
    """
    zoo = registry()
    if target == "all":
        return [plugin for plugin in zoo.plugins if not plugin.disabled]
    named = [plugin for plugin in zoo.plugins if target in (plugin.name, plugin.distribution)]
    if named and all(plugin.disabled for plugin in named):
        raise ConfigError(f"check: {named[0].origin} {named[0].absence}; take it out of that variable")
    return [plugin for plugin in named if not plugin.disabled]


def _find_block(target: str) -> BlockSpec:
    zoo = registry()
    try:
        return zoo.find_block(target, "check")
    except UnknownNameError:
        known = [spec.name for plugin in zoo.plugins for spec in plugin.blocks]
        if target in known:
            raise
        raise UnknownNameError("check", target, ["all", *known, *(plugin.name for plugin in zoo.plugins)]) from None


def _of_plugin(plugin: Plugin, quick: bool, options: Options) -> Iterator[Task]:
    def task(check: str, measure: Callable[[], Finding], kind: str = "plugin", subject: str = plugin.name) -> Task:
        return Task(plugin=plugin.name, kind=kind, subject=subject, check=check, measure=measure)

    yield task("plugin: loads", functools.partial(parts.loads, plugin))
    if plugin.reason is not None:
        return
    yield task("plugin: names", functools.partial(parts.own_names, plugin))
    for spec in registry().blocks_of(plugin):
        yield from _of_block(plugin, spec, quick, options)
    for op in plugin.ops:
        yield from _of_op(plugin, op, quick)
    for preset in plugin.presets:
        yield task("preset: builds", functools.partial(parts.preset, preset), "preset", preset.name)


def _of_block(plugin: Plugin, spec: BlockSpec, quick: bool, options: Options) -> Iterator[Task]:
    for check, measure in blocks.checks_of(spec, quick=quick, options=options.get(spec.name, {})):
        yield Task(
            plugin=plugin.name, kind=spec.kind, subject=spec.name, check=check, measure=measure, code=spec.module
        )


def _of_op(plugin: Plugin, spec: OpSpec, quick: bool) -> Iterator[Task]:
    for check, measure in parts.checks_of_op(spec, quick=quick):
        code = spec.samples if check == SAMPLES else spec.op
        yield Task(plugin=plugin.name, kind="op", subject=spec.name, check=check, measure=measure, code=code)


def conformance_tests(target: str, *, quick: bool = False, options: Options | None = None) -> Callable[[Task], None]:
    """Return a test function with one case for each check, for a test file of a plugin::

        from ultrazoo.testing import conformance_tests

        test_conforms = conformance_tests("my_plugin")

    Args:
        target: As ``plan`` takes it.
        quick: Likewise.
        options: Likewise.
    """
    import pytest

    tasks = plan(target, quick=quick, options=options)

    @pytest.mark.parametrize("check", tasks, ids=[task.id for task in tasks])
    def test_conforms(check: Task) -> None:
        __tracebackhide__ = True
        result = check.hold()
        if result.state == "not applicable":
            pytest.skip(result.what)

    return test_conforms
