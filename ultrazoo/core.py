"""The built-in plugin: the one module that names concrete blocks, ops and presets."""

from __future__ import annotations

from ultrazoo.hookspecs import hookimpl
from ultrazoo.spec import BlockSpec, OpSpec, PresetSpec

ULTRAZOO_PLUGIN_API = 1


@hookimpl
def ultrazoo_ops() -> list[OpSpec]:
    """The operators with compiled kernels."""
    from ultrazoo.ops.attention import op as attention
    from ultrazoo.ops.bitlinear import op as bitlinear
    from ultrazoo.ops.dropout import op as dropout
    from ultrazoo.ops.retention import op as retention
    from ultrazoo.ops.rk4 import op as rk4
    from ultrazoo.ops.selective_scan import op as selective_scan

    return [*retention.SPECS, *selective_scan.SPECS, *bitlinear.SPECS, *rk4.SPECS, *attention.SPECS, *dropout.SPECS]


@hookimpl
def ultrazoo_blocks() -> list[BlockSpec]:
    """Six mixers, two feed-forwards, four norms."""
    from ultrazoo.blocks import mamba, ode, retnet, sigmoid_attn, standard_attn, titan_attn
    from ultrazoo.nn import mlp, moe, norms

    mixers = [block.SPEC for block in (retnet, mamba, ode, titan_attn, standard_attn, sigmoid_attn)]
    return [*mixers, mlp.SPEC, moe.SPEC, *norms.SPECS]


@hookimpl
def ultrazoo_presets() -> list[PresetSpec]:
    """The YAML files under configs/; the first comment line of each is its summary."""
    from ultrazoo.presets import built_in

    return built_in()
