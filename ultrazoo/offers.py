"""Calls the hooks of one plugin and checks what it offers before anybody uses it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pluggy
from pydantic import BaseModel

from ultrazoo import hookspecs
from ultrazoo.callables import guard_call, guard_items, place_of
from ultrazoo.hookspecs import PLUGIN_API, PROJECT
from ultrazoo.spec import KINDS, BlockSpec, Cost, OpSpec, PresetSpec, Sample

HOOKS: dict[str, type[Any]] = {"ultrazoo_ops": OpSpec, "ultrazoo_blocks": BlockSpec, "ultrazoo_presets": PresetSpec}
Spec = BlockSpec | OpSpec | PresetSpec
STATEMENT = "ULTRAZOO_PLUGIN_API"
RESERVED = "block"
"""Beside the options of a layer this key has the name of its block."""


class OutdatedError(Exception):
    """A plugin is written for another version of the interface, or does not say for which."""


def api_of(module: Any) -> int:
    """Return the version that a plugin states.

    Raises:
        OutdatedError: It is another than this ultrazoo's, or none; the message says what to do.
    """
    stated = getattr(module, STATEMENT, None)
    if stated is None:
        raise OutdatedError(
            f"it does not say for which plugin API it is written, this ultrazoo offers {PLUGIN_API}; add the line "
            f"{STATEMENT} = {PLUGIN_API} to its module"
        )
    if not isinstance(stated, int) or isinstance(stated, bool):
        raise OutdatedError(f"got {STATEMENT} = {stated!r}, expected a whole number such as {PLUGIN_API}")
    if stated != PLUGIN_API:
        cure = "update ultrazoo" if stated > PLUGIN_API else "update the plugin"
        raise OutdatedError(f"it is written for plugin API {stated}, this ultrazoo offers {PLUGIN_API}; {cure}")
    return stated


def offers_of(module: Any) -> dict[str, tuple[Any, ...]]:
    """Call the hooks that a module implements: hook -> checked specs.

    Raises:
        Exception: Whatever the plugin raises; else TypeError, ValueError or PluginValidationError with what is wrong.
    """
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(module)
    manager.check_pending()
    implemented = {hook: impl for hook in HOOKS for impl in getattr(manager.hook, hook).get_hookimpls()}
    for hook in HOOKS.keys() - implemented.keys():
        if inspect.isfunction(getattr(module, hook, None)):
            raise TypeError(f"{hook} is not marked: put @hookimpl (from ultrazoo import hookimpl) above it")
    if not implemented:
        raise TypeError(f"it implements no hook; expected one or more of {', '.join(HOOKS)}")
    # called here and not by pluggy, which drops None
    return {hook: _checked(hook, impl.function(), HOOKS[hook]) for hook, impl in implemented.items()}


def _checked(hook: str, answer: Any, kind: type[Spec]) -> tuple[Any, ...]:
    if not isinstance(answer, Iterable) or isinstance(answer, str):
        raise TypeError(f"{hook}() returned {type(answer).__name__}, expected a list of {kind.__name__}")
    offered = tuple(answer)
    for spec in offered:
        if not isinstance(spec, kind):
            raise TypeError(f"{hook}() offered {spec!r}, expected {kind.__name__}")
        if not isinstance(spec.name, str) or not spec.name:
            raise TypeError(f"{hook}() offered a {kind.__name__} with name {spec.name!r}, expected text")
        if "/" in spec.name:
            raise ValueError(
                f"{hook}() offered {spec.name!r}, expected a name without '/', which separates distribution and name"
            )
        _CHECKS[kind](spec)
    names = [spec.name for spec in offered]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{hook}() offered {name!r} {names.count(name)} times, expected once")
    return tuple(_GUARDS[kind](spec) for spec in offered)


def _check_block(spec: BlockSpec) -> None:
    where = f"block {spec.name!r}"
    if spec.kind not in KINDS:
        raise ValueError(f"{where}: got kind {spec.kind!r}, expected one of {', '.join(KINDS)}")
    if not (isinstance(spec.config, type) and issubclass(spec.config, BaseModel)):
        raise TypeError(f"{where}: config must be a pydantic model class, got {spec.config!r}")
    if RESERVED in spec.config.model_fields:
        raise ValueError(f"{where}: {spec.config.__name__} has a field {RESERVED!r}, which YAML uses for the name")
    try:
        spec.config.model_json_schema()
    except Exception as error:
        raise TypeError(f"{where}: {spec.config.__name__} has no JSON Schema: {error}") from error
    if not spec.residual and spec.kind != "mixer":
        raise ValueError(f"{where}: got residual=False for a block of kind {spec.kind!r}, expected it of a mixer alone")
    if not callable(spec.module):
        raise TypeError(f"{where}: module must be a class or a function, got {spec.module!r}")
    if isinstance(spec.ops, str) or not all(isinstance(op, str) and "::" in op for op in spec.ops):
        raise TypeError(f"{where}: ops must be full names such as ('{spec.name}::scan',), got {spec.ops!r}")


def _check_op(spec: OpSpec) -> None:
    namespace, _, name = spec.name.partition("::")
    if not (namespace.isidentifier() and name.isidentifier()):
        raise ValueError(f"op {spec.name!r}: expected a name of the form namespace::name")
    for field in ("op", "reference", "samples", "bench_samples", "cost"):
        if not callable(getattr(spec, field)):
            raise TypeError(f"op {spec.name!r}: {field} must be a function, got {getattr(spec, field)!r}")
    if spec.differentiable:
        _check_backward(spec)


def _check_backward(spec: OpSpec) -> None:
    from ultrazoo.ops.library import library_of

    library = library_of(spec.name)
    if library is not None and not library.ops[spec.name].has_backward:
        raise ValueError(
            f"op {spec.name!r}: got differentiable=True and no backward; pass backward= to define(), or "
            f"differentiable=False to OpSpec ({place_of(spec.op)})"
        )


def _guarded_block(spec: BlockSpec) -> BlockSpec:
    if spec.state_size is None:
        return spec
    return replace(spec, state_size=guard_call(spec.state_size, f"block {spec.name!r}: state_size", int))


def _guarded_op(spec: OpSpec) -> OpSpec:
    where = f"op {spec.name!r}"
    return replace(
        spec,
        samples=guard_items(spec.samples, f"{where}: samples", Sample),
        bench_samples=guard_items(spec.bench_samples, f"{where}: bench_samples", Sample),
        cost=guard_call(spec.cost, f"{where}: cost", Cost),
        baselines={n: guard_call(f, f"{where}: baseline {n!r}") for n, f in spec.baselines.items()},
    )


def _check_preset(spec: PresetSpec) -> None:
    if not Path(spec.path).is_file():
        raise FileNotFoundError(
            f"preset {spec.name!r}: no file at {spec.path}; list it under package-data, so that the wheel carries it"
        )


_CHECKS: dict[type, Any] = {BlockSpec: _check_block, OpSpec: _check_op, PresetSpec: _check_preset}
_GUARDS: dict[type, Any] = {BlockSpec: _guarded_block, OpSpec: _guarded_op, PresetSpec: lambda spec: spec}
