"""Modelled times of the CUDA kernels at realistic sizes, beside the floors of memory and arithmetic. Not measured.

A launch takes the longest of: its bytes at the memory's bandwidth; its instructions at the rates of the arithmetic
units (fp32, exp2, int8 dot products, tensor cores); and all its warp instructions at four a clock and multiprocessor.
The last are its main instructions (cuda_work.py) times how many of any kind there are to one of these in the loop that
has most of them, read from the machine code. Instructions are spread over the multiprocessors by whole blocks: the
busiest one counts. Launches follow one another; their own few microseconds, latency, bank conflicts and clocks below
the boost clock are left out, so expect a GPU to take longer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from cuda_compile import Kernel, demangled
from cuda_devices import DEVICES, WARP, Device
from cuda_launches import Launch
from cuda_work import WORK, Call, Work, sizes_of

FP32 = ("FFMA", "FMUL", "FADD")
LANES_OF_DOT = 8
"""Operations of an IDP.4A in a lane."""
OF_IMMA = 8192
"""Operations of an IMMA.16832 in a warp."""
OF_HMMA = {"half": 2048, "tf32": 1024}
"""Multiplications with an addition of an HMMA.16816 and an HMMA.1688 in a warp."""
LENGTHS = (256, 1024, 4096)
BACKWARD_WORK = 3.0
"""Floor of a forward and a backward in forwards, as in ``ultrazoo bench``."""
ELEMENT = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Modelled:
    """Seconds of a launch, and what takes them."""

    seconds: float
    bound: str


def time_of(work: Work, launch: Launch, kernel: Kernel | None, device: Device) -> Modelled:
    """Return the modelled time of a launch.

    Args:
        work: What it moves and computes.
        launch: Its blocks.
        kernel: Its machine code for the device; without any, instructions other than the main ones are left out.
        device: Where.
    """
    loops = [loop.counts for loop in kernel.loops] if kernel else []
    fp_each = _share(loops, FP32)
    by_tensor = bool(kernel and any(name.startswith("IMMA") for name in kernel.instructions))
    dot_each = _share(loops, ("IMMA",) if by_tensor else ("IDP",))
    dots = work.int8 / OF_IMMA if by_tensor else work.int8 / LANES_OF_DOT / WARP
    products = work.half / OF_HMMA["half"] + work.tf32 / OF_HMMA["tf32"]
    issued = work.fp / WARP * fp_each + dots * dot_each + products * _share(loops, ("HMMA",))
    busiest = -(-launch.blocks // device.multiprocessors) * device.multiprocessors / launch.blocks
    arithmetic = {
        "fp32": work.fp / (device.flops / 2),
        "tensor cores": work.half / (device.tensor_flops / 2) + work.tf32 / (device.tf32_flops / 2),
        "exp2": work.special / device.special_rate,
        "int8": work.int8 / (device.tensor_int8 if by_tensor else device.dot_rate),
        "instructions": issued / device.issue_rate,
    }
    times = {name: seconds * busiest for name, seconds in arithmetic.items()}
    times["memory"] = work.bytes / device.bandwidth
    bound = max(times, key=lambda name: times[name])
    return Modelled(times[bound], bound)


def _share(loops: list[Counter[str]], main: tuple[str, ...]) -> float:
    """Return the instructions of any kind to one main instruction, in the loop that has most of these."""
    counted = [(sum(loop[name] for name in main), sum(loop.values()) - loop["NOP"]) for loop in loops]
    most, total = max(counted, default=(0, 0))
    return total / most if most else 1.0


def floors(call: Launch, device: Device) -> tuple[float, float]:
    """Return the seconds that the op's least bytes and least flops take at the device's peaks."""
    times = BACKWARD_WORK if call.backward else 1.0
    if "bitlinear" in call.op:
        rate = device.tensor_int8
    else:
        rate = device.flops if call.dtype == "float32" or "retention" not in call.op else device.tensor_flops
    return times * call.bytes / device.bandwidth, times * call.flops / rate


def table(kernels: Iterable[Kernel], launches: Iterable[Launch]) -> str:
    """A row for each op, sample, dtype and direction; the devices side by side."""
    kernels = list(kernels)
    calls: dict[tuple[str, str, str, bool], dict[str, list[Launch]]] = {}
    for launch in launches:
        if is_shown(launch):
            key = (launch.op, launch.sample, launch.dtype, launch.backward)
            calls.setdefault(key, {}).setdefault(launch.device, []).append(launch)
    named = demangled(sorted({launch.kernel for found in calls.values() for each in found.values() for launch in each}))
    code = {(kernel.op, kernel.name, kernel.arch): kernel for kernel in kernels}
    home = {kernel.mangled: kernel.op for kernel in kernels}
    devices = [device for device in DEVICES if any(device.name in found for found in calls.values())]
    lines = [_heading(devices)]
    columns = [f"{device.name.split('-')[0]}: {what}" for device in devices for what in ("floors", "modelled", "by")]
    lines += [
        f"| op | sample | dtype | direction | launches | {' | '.join(columns)} |",
        "|" + "---|" * (5 + len(columns)),
    ]
    forward = {(*key[:3], *found): sum(map(len, found.values())) for key, found in calls.items() if not key[3]}
    for (op, sample, dtype, backward), found in calls.items():
        if backward and forward.get((op, sample, dtype, *found)) == sum(map(len, found.values())):
            continue  # its gradients are torch's
        cells = [op.partition("::")[2], sample, dtype, "forward + backward" if backward else "forward"]
        cells.append(str(len(next(iter(found.values())))))
        for device in devices:
            cells += _cells(found.get(device.name, []), device, named, code, home)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def is_shown(launch: Launch) -> bool:
    """Tell whether a launch is of a sample that the table has."""
    length = sizes_of(launch.sample).get("L")
    return not launch.sample.startswith("small: ") and launch.op in WORK and (length is None or length in LENGTHS)


def _cells(
    launches: list[Launch],
    device: Device,
    named: dict[str, str],
    code: dict[tuple[str, str, int], Kernel],
    home: dict[str, str],
) -> list[str]:
    if not launches:
        return ["", "", ""]
    first, names = launches[0], [named[launch.kernel] for launch in launches]
    call = Call(sizes_of(first.sample), ELEMENT[first.dtype], "causal" in first.sample, names)
    modelled = []
    for launch, name, work in zip(launches, names, WORK[first.op](call), strict=True):
        kernel = code.get((home.get(launch.kernel, ""), name, device.arch))
        modelled.append(time_of(work, launch, kernel, device))
    total = sum(each.seconds for each in modelled)
    longest = max(modelled, key=lambda each: each.seconds)
    memory, arithmetic = floors(first, device)
    if first.backward and first.op == "ultrazoo::bitlinear":
        return ["", f"{1e6 * total:.1f}", longest.bound]
    times_over = total / max(memory, arithmetic)
    return [f"{1e6 * memory:.1f}, {1e6 * arithmetic:.1f}", f"{1e6 * total:.1f} (x{times_over:.1f})", longest.bound]


def _heading(devices: list[Device]) -> str:
    peaks = "\n".join(
        f"- {device.name}: {device.bandwidth / 1e12:.2f} TB/s, {device.flops / 1e12:.1f} TFLOP/s fp32, "
        f"{device.tensor_flops / 1e12:.0f} bf16 and {device.tensor_int8 / 1e12:.0f} int8 on tensor cores, "
        f"{device.multiprocessors} multiprocessors at {device.clock / 1e9:.2f} GHz ({device.source})"
        for device in devices
    )
    return f"""
## Times: modelled, not measured

Microseconds. Floors: the op's least bytes and its least flops (`OpSpec.cost`; three times that with the gradients) at a
device's published peaks; fp32 outside tensor cores, bf16 retention and int8 products on them. Modelled: what these
launches need by their bytes, their instructions and their blocks, and in brackets how often the greater floor that is;
`by` says what takes longest in the longest launch. The model is in bench/cuda_model.py, the counts are in
bench/cuda_work.py. It leaves out latency and the few microseconds of each launch: expect a GPU to take longer.
Gradients of `bitlinear` are without their two matrix products, which are torch's, and so have no floor here.

{peaks}
"""
