"""Whatever a plugin's functions raise or return, a command ends with one line that names the file and the line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import plugin_parts
import pytest
import torch
from cli_parts import call
from pydantic import Field
from torch import Tensor, nn

from ultrazoo import registry as registry_module
from ultrazoo.callables import place_of
from ultrazoo.config import block_config, model_around
from ultrazoo.errors import PluginError
from ultrazoo.nn.block_config import BlockConfig
from ultrazoo.ops import OpLibrary
from ultrazoo.registry import Registry
from ultrazoo.spec import BlockSpec, Cost, OpSpec, Sample

PATTERN = ("--set", "model.layer_pattern=[bad]", "--set", "model.use_hope=false")
Capture = pytest.CaptureFixture[str]


def double(x: Tensor) -> Tensor:
    return 2 * x


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    yield Sample(name="L3", args=(torch.ones(2, 3, 5, device=device, dtype=dtype),))


def op(**changes: Any) -> OpSpec:
    values = {
        "op": double,
        "reference": double,
        "samples": samples,
        "bench_samples": samples,
        "cost": lambda sample: Cost(flops=1, bytes=1),
        "dtypes": ("float32",),
    }
    return OpSpec(name="bad::double", **{**values, **changes})


def no_default() -> int:
    raise KeyError("width")


class Config(BlockConfig):
    hidden_size: int
    inner: int = Field(default_factory=no_default, description="Inner width.")


def raises(*args: Any) -> Any:
    raise KeyError("here")


def raises_late(*args: Any) -> Iterator[Sample]:
    yield from samples(*args)
    raise ZeroDivisionError("at the second one")


def refuses(config: Any) -> nn.Module:
    raise ValueError("got an odd width")


LINES = {function: function.__code__.co_firstlineno for function in (raises, raises_late, refuses, no_default)}


def at(function: Callable[..., Any], after: int = 1) -> str:
    return re.escape(f"({__file__}:{LINES[function] + after})")


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Offer an op and a block by a plugin, beside what is built in."""

    def use(spec: OpSpec | None = None, **block: Any) -> None:
        blocks = [plugin_parts.block("bad", **block)]
        module = plugin_parts.module_with(
            ultrazoo_ops=lambda: [] if spec is None else [spec], ultrazoo_blocks=lambda: blocks
        )
        plugins = plugin_parts.load(monkeypatch, plugin_parts.Entry("bad", "ultrazoo-bad", module))
        assert plugins["ultrazoo-bad:bad"].reason is None
        zoo = Registry(list(plugins.values()))
        monkeypatch.setattr(registry_module, "_load", lambda: zoo)

    return use


def error_of(capsys: Capture, *arguments: str) -> str:
    code = call(*arguments)
    err = capsys.readouterr().err
    assert code == 1 and "Traceback" not in err, err
    error, line = err.splitlines()[-1].split(": ", 1)
    assert error == "error", err
    return line


@pytest.mark.parametrize(
    ("changes", "command", "message"),
    [
        ({"bench_samples": raises}, ("bench", "bad::double"), f"bench_samples: raised KeyError: 'here' {at(raises)}"),
        ({"cost": raises}, ("bench", "bad::double"), f"cost: raised KeyError: 'here' {at(raises)}"),
        ({"cost": lambda sample: 3.0}, ("bench", "bad::double"), "cost: returned 3.0, expected Cost"),
        ({"samples": raises}, ("bench", "bad::double"), f"samples: raised KeyError: 'here' {at(raises)}"),
        ({"samples": lambda d, t: None}, ("bench", "bad::double"), "samples: returned None, expected Samples"),
        (
            {"baselines": {"slow": raises}},
            ("bench", "bad::double"),
            f"baseline 'slow': raised KeyError: .* {at(raises)}",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_an_ops_function_ends_in_one_line(
    offer: Callable[..., None], capsys: Capture, changes: dict[str, Any], command: tuple[str, ...], message: str
) -> None:
    offer(op(**changes))
    assert re.search(f"op 'bad::double': {message}", error_of(capsys, *command, "--seconds", "0"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": raises_late}, f"op 'bad::double': samples: raised ZeroDivisionError: .* {at(raises_late, 2)}"),
        ({"op": lambda x: raises(x)}, f"L3: raised KeyError: 'here' {at(raises)}"),
        ({"reference": lambda x: raises(x)}, f"raised KeyError: 'here' {at(raises)}"),
        ({"op": lambda x: x.detach(), "reference": lambda x: x.detach()}, "declared differentiable"),
    ],
    ids=["samples", "op", "reference", "gradient"],
)
def test_parity_names_the_line_and_goes_through(
    offer: Callable[..., None], capsys: Capture, changes: dict[str, Any], message: str
) -> None:
    offer(op(**changes))
    assert call("parity", "bad::double") == 3
    out = capsys.readouterr()
    assert re.search(message, out.err) and "Traceback" not in out.err


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"state_size": raises}, f"block 'bad': state_size: raised KeyError: 'here' {at(raises)}"),
        ({"state_size": lambda config: None}, "block 'bad': state_size: returned None, expected int"),
        ({"config": Config}, f"block 'bad': Config: raised KeyError: 'width' {at(no_default)}"),
        ({"module": raises}, f"block 'bad': its module: raised KeyError: 'here' {at(raises)}"),
    ],
    ids=["state_size", "state_size of None", "default", "module"],
)
def test_a_blocks_function_ends_in_one_line(
    offer: Callable[..., None], capsys: Capture, block: dict[str, Any], message: str
) -> None:
    offer(**block)
    assert re.search(message, error_of(capsys, "show", "bad"))


@pytest.mark.parametrize("block", [{"module": raises}, {"config": Config}], ids=["module", "default"])
def test_a_dry_run_ends_in_one_line(offer: Callable[..., None], capsys: Capture, block: dict[str, Any]) -> None:
    offer(**block)
    line = error_of(capsys, "train", "mini", "--dry-run", *PATTERN)
    assert "block 'bad': " in line and __file__ in line


def test_a_refused_option_is_an_error_of_the_config(offer: Callable[..., None], capsys: Capture) -> None:
    offer(module=refuses)
    assert call("show", "bad") == 2
    assert re.search(f"block 'bad': got an odd width {at(refuses)}", capsys.readouterr().err)


def test_check_names_the_line_of_each_failure(offer: Callable[..., None], capsys: Capture) -> None:
    offer(op(samples=raises), state_size=raises)
    assert call("check", "bad", "--quick") == 1
    err = capsys.readouterr().err
    assert re.search(f"'size: state' failed\n  block 'bad': state_size: raised KeyError: 'here' {at(raises)}", err)
    assert re.search(f"'samples: suffice' failed\n  op 'bad::double': samples: raised .* {at(raises)}", err)
    assert "Traceback" not in err


def test_an_op_that_claims_a_gradient_and_has_none_is_refused_when_it_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = OpLibrary("test_no_backward")
    try:
        library.define("double(Tensor x) -> Tensor", double, fake=lambda x: x.new_empty(x.shape))
        found = {}
        for differentiable in (True, False):
            spec = OpSpec(**{**vars(op(differentiable=differentiable)), "name": "test_no_backward::double"})
            module = plugin_parts.module_with(ultrazoo_ops=lambda spec=spec: [spec])
            loaded = plugin_parts.load(monkeypatch, plugin_parts.Entry("bad", "ultrazoo-bad", module))
            found[differentiable] = loaded["ultrazoo-bad:bad"].reason
    finally:
        library.forget()
    assert found[False] is None
    assert "op 'test_no_backward::double': got differentiable=True and no backward; pass backward=" in found[True]
    assert place_of(double) in found[True]


def test_a_clear_error_of_the_plugin_passes_as_it_is(offer: Callable[..., None]) -> None:
    def clear(config: Any) -> int:
        raise PluginError("block 'bad': got 3 heads, expected an even number")

    offer(state_size=clear)
    spec: BlockSpec = registry_module.registry().find_block("bad")
    assert spec.state_size is not None
    with pytest.raises(PluginError, match=r"^block 'bad': got 3 heads, expected an even number$"):
        spec.state_size(block_config(spec, model_around(spec, 8)))
