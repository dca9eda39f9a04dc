"""The checks of a plugin besides its blocks: that it loads, its ops on every backend, its presets."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator

import torch

from ultrazoo.config import load_config
from ultrazoo.hookspecs import PLUGIN_API
from ultrazoo.model import build_model
from ultrazoo.ops.library import get_kernel_policy, kernel_status
from ultrazoo.plugins import Plugin
from ultrazoo.registry import registry
from ultrazoo.spec import OpSpec, PresetSpec
from ultrazoo.testing.conformance_result import Finding, absent, bounded, figure, finding_of
from ultrazoo.testing.kernel_laws import kernels_of
from ultrazoo.testing.measure import Check
from ultrazoo.testing.model_parity import with_kernels
from ultrazoo.testing.op_laws import OP_LAWS, hold_kernel, hold_reference
from ultrazoo.testing.parity import Backend, Cases, backends_of, check_op, isas_of
from ultrazoo.testing.sample_rules import missing

CPU = torch.device("cpu")
SAMPLES = "samples: suffice"


def loads(plugin: Plugin) -> Finding:
    """The plugin states the version of the interface that this ultrazoo offers, and its hooks give valid specs."""
    if plugin.reason is not None:
        return Finding(state="failed", what=plugin.reason)
    offers = [f"{len(getattr(plugin, kind))} {kind}" for kind in ("blocks", "ops", "presets")]
    return Finding(
        state="passed", what=f"{plugin.origin} is written for plugin API {PLUGIN_API}; it offers {', '.join(offers)}"
    )


def own_names(plugin: Plugin) -> Finding:
    """No other plugin offers a block, op or preset of the same name."""
    taken = [*registry().clashes(), *registry().shadowed()]
    clashes = [line for line in taken if plugin.origin in line]
    return bounded("; ".join(clashes) or "names that another plugin offers too", float(len(clashes)), 0.0)


def checks_of_op(spec: OpSpec, *, quick: bool) -> Iterator[tuple[str, Callable[[], Finding]]]:
    """Yield name and function of each check: the samples, the laws of documents, and parity in each dtype.

    Args:
        spec: The op.
        quick: float32 alone, with the best instruction set, and without torch's slow check of the registration.
    """
    yield SAMPLES, functools.partial(samples_suffice, spec)
    if "segments" in inspect.signature(spec.op).parameters:
        for name in OP_LAWS:
            yield f"law: {name}", functools.partial(_law, name, spec)
        for name in OP_LAWS:
            yield f"compiled law: {name}", functools.partial(_compiled_law, name, spec)
    for dtype in spec.dtypes[:1] if quick else spec.dtypes:
        yield f"parity: {dtype}", functools.partial(parity, spec, dtype, quick=quick)


def samples_suffice(spec: OpSpec) -> Finding:
    """The samples have the sizes, documents and options at which kernels go wrong."""
    samples = list(spec.samples(CPU, torch.float32))
    lacks = missing(spec, samples)
    what = f"add samples with {'; '.join(lacks)}" if lacks else f"{len(samples)} samples"
    return bounded(f"cases that no sample shows; {what}", float(len(lacks)), 0.0)


def _law(name: str, spec: OpSpec) -> Finding:
    return finding_of(hold_reference(name, spec))


def _compiled_law(name: str, spec: OpSpec) -> Finding:
    policy, why = kernels_of([spec.name])
    return absent(why) if policy is None else finding_of(hold_kernel(name, spec, policy))


def parity(spec: OpSpec, dtype: str, *, quick: bool) -> Finding:
    """Every backend of an op is within the error of its reference in float64, and keeps the rules of memory."""
    if get_kernel_policy() != "reference" and with_kernels([spec.name], CPU):
        status = kernel_status(spec.name, "cpu")
        if not status.compiled:
            return Finding(state="failed", what=f"kernel exists: {status.detail}; {status.fix}")
    kind: torch.dtype = getattr(torch, dtype)
    cases, found = Cases(spec, CPU, kind), list[Check]()
    for backend in backends_of(spec, CPU):
        levels = isas_of(spec, CPU) if backend == "compiled" else [None]
        for level in levels[:1] if quick else levels:
            first = level == levels[0] and not quick
            found += check_op(spec, CPU, kind, backend, isa=level, cases=cases, opcheck=first)
    failed = [check for check in found if not check.ok]
    runs = sorted({_runs(check.backend, check.isa) for check in found})
    if failed:
        told = failed[0]
        more = f"; {len(failed) - 1} more of {len(found)} checks failed" if len(failed) > 1 else ""
        return Finding(
            state="failed",
            what=f"{_runs(told.backend, told.isa)}: {told.check}: {told.detail}{more}",
            measured=told.error,
            limit=told.tolerance,
        )
    measured = [(c.error, c.tolerance) for c in found if c.error is not None and c.tolerance]
    error, tolerance = max(measured, key=lambda pair: pair[0] / pair[1], default=(None, None))
    what = f"{len(found)} checks on {', '.join(runs)}; the error nearest to its limit"
    return Finding(state="passed", what=what, measured=error, limit=tolerance)


def _runs(backend: Backend | str, isa: str) -> str:
    return f"{backend} {isa}".rstrip()


def preset(spec: PresetSpec) -> Finding:
    """The file validates, and the model is built: of shapes alone, or for real if a block needs numbers for that."""
    loaded = load_config(spec.path)
    try:
        with torch.device("meta"):
            model = build_model(loaded.config.model)
    except (NotImplementedError, RuntimeError):
        small = {
            "num_layers": min(2, loaded.config.model.num_layers),
            "vocab_size": min(1000, loaded.config.model.vocab_size),
        }
        model = build_model(loaded.config.model.model_copy(update=small))
        size = sum(parameter.numel() for parameter in model.parameters())
        return figure("it validates; parameters with two layers and a small vocabulary", float(size))
    size = sum(parameter.numel() for parameter in model.parameters())
    what = "it validates, and the model is built of shapes; parameters"
    return Finding(state="passed", what=what, measured=float(size))
