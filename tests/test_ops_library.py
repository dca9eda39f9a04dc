"""How an op is defined, and which kernel a call takes."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ultrazoo import ops
from ultrazoo.errors import ConfigError, KernelUnavailableError, UnknownNameError
from ultrazoo.ops import kernel_policy, kernel_status, library, loader, policy, set_kernel_policy

calls: list[str] = []


def _cube(x: Tensor, scale: float) -> Tensor:
    calls.append("reference")
    return scale * x**3


def _cube_backward(grad: Tensor, x: Tensor, scale: float) -> Tensor:
    calls.append("reference backward")
    return 3 * scale * grad * x**2


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.scale = inputs[1]


cube_backward = library.define(
    "test_cube_backward(Tensor grad, Tensor x, float scale) -> Tensor",
    _cube_backward,
    fake=lambda grad, x, scale: torch.empty_like(x),
)
cube = library.define(
    "test_cube(Tensor x, float scale) -> Tensor",
    _cube,
    fake=lambda x, scale: torch.empty_like(x),
    setup_context=_save,
    backward=lambda ctx, grad: (ctx.backward_op(grad, *ctx.saved_tensors, ctx.scale), None),
)
plain = library.define("test_plain(Tensor x) -> Tensor", lambda x: x + 1, fake=torch.empty_like)


def _kernel(x: Tensor, scale: float) -> Tensor:
    calls.append("kernel")
    return scale * x * x * x


def _kernel_backward(grad: Tensor, x: Tensor, scale: float) -> Tensor:
    calls.append("kernel backward")
    return 3 * scale * grad * x * x


@pytest.fixture(autouse=True)
def no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No built library in sight: the kernels here are registered by hand."""
    monkeypatch.setitem(loader._loaded, "ultrazoo", loader.Loaded(reason="nothing was built", fix="build it"))
    monkeypatch.setattr(library, "_announced", set())
    monkeypatch.setattr(policy, "current", "auto")
    library._warn_without_library.cache_clear()
    calls.clear()
    yield
    library._warn_without_library.cache_clear()


@pytest.fixture
def forward_kernel() -> Iterator[None]:
    with torch.library._scoped_library("ultrazoo", "IMPL") as scope:
        scope.impl("test_cube", _kernel, "CPU")
        yield


@pytest.fixture
def kernels(forward_kernel: None) -> Iterator[None]:
    with torch.library._scoped_library("ultrazoo", "IMPL") as scope:
        scope.impl("test_cube_backward", _kernel_backward, "CPU")
        yield


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("ultrazoo"), "propagate", True)
    caplog.set_level(logging.INFO, logger="ultrazoo")
    return caplog


@pytest.mark.parametrize("twin", ["default", "reference"])
def test_an_op_with_a_reference_alone_is_a_whole_op(twin: str) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    torch.library.opcheck(getattr(torch.ops.ultrazoo.test_cube, twin), (x, 2.0))
    cube(x, 2.0).sum().backward()
    torch.testing.assert_close(x.grad, 6 * x.detach() ** 2)


def test_the_kernel_runs_once_it_is_registered_and_its_backward_with_it(kernels: None) -> None:
    cube(torch.randn(3, requires_grad=True), 2.0).sum().backward()
    assert calls == ["kernel", "kernel backward"]


def test_the_policy_reference_holds_for_the_backward_too_wherever_it_runs(kernels: None) -> None:
    x = torch.randn(3, requires_grad=True)
    with kernel_policy("reference"):
        out = cube(x, 2.0)
    out.sum().backward()
    assert calls == ["reference", "reference backward"]
    out = cube(x, 2.0)
    with kernel_policy("reference"):
        out.sum().backward()
    assert calls[2:] == ["kernel", "kernel backward"]


def test_a_compiled_graph_follows_the_policy(kernels: None) -> None:
    function = torch.compile(lambda x: cube(x, 2.0).sin(), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, requires_grad=True)
    for name, kind in (("auto", "kernel"), ("reference", "reference"), ("compiled", "kernel")):
        calls.clear()
        with kernel_policy(name):  # type: ignore[arg-type]
            function(x).sum().backward()
        assert calls == [kind, f"{kind} backward"]


def test_compiled_without_a_kernel_says_why_and_what_to_do() -> None:
    with kernel_policy("compiled"), pytest.raises(KernelUnavailableError) as error:
        cube(torch.randn(3), 2.0)
    assert str(error.value) == (
        "kernels: ultrazoo::test_cube on cpu: compiled was asked for, but nothing was built; build it"
    )
    function = torch.compile(lambda x: plain(x), fullgraph=True, backend="aot_eager")
    with kernel_policy("compiled"), pytest.raises(KernelUnavailableError, match="test_plain on cpu"):
        function(torch.randn(3))
    assert calls == []


def test_compiled_wants_the_backward_kernel_too(forward_kernel: None) -> None:
    status = kernel_status("ultrazoo::test_cube", "cpu")
    assert (status.compiled, status.backward_compiled) == (False, False)
    with kernel_policy("compiled"), pytest.raises(KernelUnavailableError):
        cube(torch.randn(3), 2.0)


def test_dtypes_without_kernels_run_the_reference_or_are_refused(kernels: None) -> None:
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: cube(x, 2.0), (x,))
    assert set(calls) == {"reference", "reference backward"}
    with (
        kernel_policy("compiled"),
        pytest.raises(KernelUnavailableError, match=r"no compiled kernel for these inputs: .* not torch.float64"),
    ):
        cube(x, 2.0)


def test_auto_says_once_what_it_took_and_why(kernels: None, lines: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        cube(torch.randn(3), 2.0)
        plain(torch.randn(3))
        library._ops["ultrazoo::test_plain"](torch.randn(3, dtype=torch.float64))
    said = [record.getMessage() for record in lines.records]
    assert len(said) == 3
    assert said[0].startswith("kernels: ultrazoo::test_cube on cpu runs compiled: ")
    assert said[1] == "kernels: every op of ultrazoo runs its reference: nothing was built; build it"
    assert lines.records[1].levelno == logging.WARNING
    assert said[2].startswith(
        "kernels: ultrazoo::test_plain on cpu runs the reference: the kernels take (torch.float32"
    )


def test_a_library_that_lacks_an_op_is_reported(
    monkeypatch: pytest.MonkeyPatch, lines: pytest.LogCaptureFixture, tmp_path: Any
) -> None:
    monkeypatch.setitem(loader._loaded, "ultrazoo", loader.Loaded(path=tmp_path / "library.so"))
    plain(torch.randn(3))
    (record,) = lines.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().endswith("library.so has no cpu kernel for it")


def test_the_reference_needs_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: str) -> None:
        raise AssertionError("looked for a library")

    monkeypatch.setattr(loader, "load", fail)
    with kernel_policy("reference"):
        assert torch.equal(plain(torch.zeros(2)), torch.ones(2))


def test_the_policy_comes_from_the_caller_or_else_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ULTRAZOO_KERNELS", "reference")
    set_kernel_policy("compiled")
    assert library.get_kernel_policy() == "compiled"
    set_kernel_policy(None)
    assert library.get_kernel_policy() == "reference"
    with pytest.raises(
        ConfigError, match="got 'compild', expected one of auto, compiled, reference; did you mean 'compiled'"
    ):
        set_kernel_policy("compild")
    assert library.get_kernel_policy() == "reference"
    monkeypatch.setattr(policy, "current", "fast")  # as read from the environment at import
    with pytest.raises(ConfigError, match="ULTRAZOO_KERNELS: got 'fast'"):
        plain(torch.zeros(2))


def test_kernel_status_of_an_unknown_op_names_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="ultrazoo::test_cube"):
        kernel_status("ultrazoo::test_cub", "cpu")


def test_fake_devices_need_no_kernel() -> None:
    assert plain(torch.empty(2, device="meta")).device.type == "meta"
    with torch._subclasses.FakeTensorMode():
        assert plain(torch.empty(2, device="cuda")).device.type == "cuda"


def test_the_package_offers_functions_not_the_folders_of_the_same_names() -> None:
    importlib.import_module("ultrazoo.ops.retention.reference")
    assert callable(ops.retention) and callable(ops.rk4_combine)
    assert "retention" in dir(ops)
    with pytest.raises(AttributeError, match="retentoin"):
        _ = ops.retentoin
