"""Runs the CUDA kernels under the emulator of tests/simt, and holds them to the references."""

from __future__ import annotations

import ctypes
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import simt_build
import simt_samples
import throwaway_ops
import torch

from ultrazoo.ops import loader
from ultrazoo.ops.library import kernel_policy
from ultrazoo.spec import OpSpec, Sample
from ultrazoo.testing import op_checks
from ultrazoo.testing.measure import FORWARD_FACTOR, GRADIENT_FACTOR, floor_of, relative_error, run
from ultrazoo.testing.parity import Case, Cases, check_op

CPU = torch.device("cpu")
ORDERS = ("ascending", "descending", "random")
SHARED_BYTES = {61: 48 * 1024, 75: 64 * 1024, 80: 163 * 1024, 90: 227 * 1024}
"""What a block may ask for, by compute capability."""


@dataclass(frozen=True)
class Row:
    """What came of one op, dtype and order of the threads."""

    op: str
    dtype: str
    order: str
    checks: int
    failures: tuple[str, ...]
    worst: float
    """The largest error, as a part of what is allowed."""
    seconds: float

    def __str__(self) -> str:
        verdict = f"FAILED {len(self.failures)} of" if self.failures else "ok"
        line = (
            f"{self.op:<18} {self.dtype:<9} {self.order:<10} {verdict} {self.checks} checks, "
            f"error {self.worst:.2f} of allowed, {self.seconds:.1f} s"
        )
        return "\n".join((line, *(f"    {failure}" for failure in self.failures)))


class Emulated:
    """The kernels of one folder of csrc, as CPU kernels of throwaway ops."""

    def __init__(self, folder: str, library: Path, prefix: str = simt_build.prefix()) -> None:
        self.prefix, self.specs = prefix, throwaway_ops.define(folder, prefix)
        torch.ops.load_library(str(library))
        self.path, self._library = library, ctypes.CDLL(str(library))
        self.configure("ascending")

    def replace_real_kernels(self) -> None:
        """Keep this process from building and loading csrc's kernels for the CPU, which it has no use for."""
        self._library.ultrazoo_cpu_isa.restype = ctypes.c_char_p
        loader._loaded[loader.BUILT_IN] = loader.Loaded(path=self.path, handle=self._library)

    def set_fault(self, number: int) -> None:
        """Turn on a fault of a build with faults (planting.py), or all of them off with 0."""
        self._library.simt_set_fault(number)

    def configure(self, order: str, seed: int = 1, capability: int = 90) -> None:
        """Choose the order of the threads, and the device to be."""
        shared = ctypes.c_int(SHARED_BYTES[capability])
        self._library.simt_configure(ORDERS.index(order), ctypes.c_ulonglong(seed), shared, ctypes.c_int(capability))


def cases_of(spec: OpSpec, dtype: torch.dtype, name: str = "", more: bool = True) -> Cases:
    """Return an op's samples, and ``more`` of simt_samples.py, as far as ``name`` is part of their names."""
    cases = Cases(spec, CPU, dtype)
    others = simt_samples.samples(spec.op.__name__, dtype) if more else ()
    cases.samples = [sample for sample in (*cases.samples, *others) if name in sample.name]
    return cases


def parity(spec: OpSpec, dtype: torch.dtype, order: str, cases: Cases, opcheck: bool) -> Row:
    """Run every check of the parity harness but that of the number of the CPU's threads, which nothing here uses."""
    start, worst = time.monotonic(), 0.0
    with mock.patch.object(op_checks, "same_by_any_threads", lambda *_: None):
        found = list(check_op(spec, CPU, dtype, "compiled", cases=cases, opcheck=opcheck))
    for check in found:
        if check.error is not None and check.tolerance:
            worst = max(worst, check.error / check.tolerance)
    failures = [
        f"{check.check}: {check.detail}"
        + (f" (error {check.error:.3g}, allowed {check.tolerance:.3g})" if check.error is not None else "")
        for check in found
        if not check.ok
    ]
    return _row(spec, dtype, order, len(found), failures, worst, start)


def each_sample(
    spec: OpSpec,
    dtype: torch.dtype,
    order: str,
    cases: Cases,
    complaints: Callable[[], str] = lambda: "",
    first_failure: bool = False,
) -> Row:
    """Run every sample twice, the second time one element further in memory, for a sanitizer to watch.

    Args:
        spec: The op.
        dtype: Of the samples.
        order: Of the threads, for the row alone.
        cases: The samples and the truth.
        complaints: Says what a sanitizer that does not end the process has found since it was last asked.
        first_failure: Stop there.
    """
    start, worst, failures, count = time.monotonic(), 0.0, list[str](), 0
    with kernel_policy("compiled"):
        for case in cases.cases:
            for sample, copy in ((case.sample, True), (_shifted(case.sample), False)):
                count += 1
                where = case.sample.name + ("" if copy else ", shifted")
                print(f"# {spec.name} {dtype} {order}: {where}", flush=True)
                try:
                    for name, part in _errors(spec, case, sample, copy, dtype):
                        worst = max(worst, part)
                        if not part <= 1:
                            failures.append(f"{where}: {name}: error {part:.3g} of allowed")
                except (RuntimeError, ValueError, TypeError) as error:
                    failures.append(f"{where}: {str(error).splitlines()[0]}")
                if found := complaints():
                    failures.append(f"{where}: {found}")
                if failures and first_failure:
                    return _row(spec, dtype, order, count, failures, worst, start)
    return _row(spec, dtype, order, count, failures, worst, start)


def _errors(spec: OpSpec, case: Case, sample: Sample, copy: bool, dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    got = run(spec, sample, copy=copy)
    for kind, factor in (("outputs", FORWARD_FACTOR), ("gradients", GRADIENT_FACTOR)):
        ours, truth, same = (getattr(each, kind) for each in (got, case.truth, case.same))
        for name, want in truth.items():
            allowed = factor * relative_error(same[name], want) + floor_of(dtype)
            yield f"{kind}: {name}", relative_error(ours[name], want) / allowed


def _shifted(sample: Sample) -> Sample:
    """Return the same numbers, not aligned to more than an element, each tensor at the very end of its memory."""

    def shifted(value: object) -> object:
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            return value
        return torch.empty(value.numel() + 1, dtype=value.dtype)[1:].view(value.shape).copy_(value)

    kwargs = {name: shifted(value) for name, value in sample.kwargs.items()}
    return Sample(name=sample.name, args=tuple(shifted(value) for value in sample.args), kwargs=kwargs)


def complaints() -> str:
    """Return what ThreadSanitizer has written in this process since the last call, in one line."""
    log = Path(f"{os.environ.get('SIMT_LOG', os.devnull)}.{os.getpid()}")
    written = log.read_text(errors="replace") if log.exists() else ""
    new, complaints.seen = written[complaints.seen :], len(written)  # type: ignore[attr-defined]
    races = re.findall(
        r"WARNING: ThreadSanitizer: ([\w -]+) \(pid.*?SUMMARY: ThreadSanitizer: [\w -]+ (\S+)", new, re.S
    )
    places = sorted({f"{kind} at {place[max(0, place.find('csrc/')) :]}" for kind, place in races})
    return "; ".join(places[:4]) if places else new.strip()[:2000]


complaints.seen = 0  # type: ignore[attr-defined]


def _row(
    spec: OpSpec, dtype: torch.dtype, order: str, checks: int, failures: list[str], worst: float, start: float
) -> Row:
    kind = str(dtype).removeprefix("torch.")
    return Row(spec.op.__name__, kind, order, checks, tuple(failures), worst, time.monotonic() - start)
