"""Faults planted in the real C++ sources: the harness catches each of them, and passes the same build without them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from planted_build import OPS, Planted, compile_with_faults
from planted_faults import FAULTS
from planting import Fault

from ultrazoo.ops import build
from ultrazoo.testing.parity import Cases, Check, check_op

CPU = torch.device("cpu")

try:
    build.find_compiler()
except build.BuildError as error:
    pytest.skip(error.reason, allow_module_level=True)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Planted]:
    root = tmp_path_factory.getbasetemp()
    shared = root.parent if root.name.startswith("popen-") else root  # by all workers of pytest-xdist
    ops = Planted(compile_with_faults(shared / "planted_faults"))
    yield ops
    ops.forget()


@pytest.fixture(scope="module")
def cases() -> dict[str, Cases]:
    return {}


def failed(planted: Planted, cases: dict[str, Cases], op: str) -> list[Check]:
    spec = planted.specs[op]
    shared = cases.setdefault(op, Cases(spec, CPU, torch.float32))
    found = list(check_op(spec, CPU, torch.float32, "compiled", cases=shared, opcheck=False))
    assert len(found) > 5 and found[0].ok, found
    return [check for check in found if not check.ok]


@pytest.mark.parametrize("op", OPS)
def test_the_build_without_its_faults_passes(planted: Planted, cases: dict[str, Cases], op: str) -> None:
    planted.turn_on(None)
    assert failed(planted, cases, op) == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.op}: {fault.name}")
def test_a_planted_fault_is_caught(planted: Planted, cases: dict[str, Cases], fault: Fault) -> None:
    planted.turn_on(fault)
    try:
        caught_by = {check.check for check in failed(planted, cases, fault.op)}
    finally:
        planted.turn_on(None)
    assert fault.caught_by in caught_by
