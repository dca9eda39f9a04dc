"""What each launch of a call moves and computes, counted in the kernels' sources: the input of the time model.

Bytes are those of the device's memory: what blocks of one launch read of each other's data comes from its cache.
``fp`` counts additions, multiplications and fused ones of fp32 in a lane, without addresses, conversions and exchange
between lanes, which the model takes from the machine code. ``half`` and ``tf32`` count the same on tensor cores, as the
devices of the model have them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

CHUNK = 64
"""Tokens of a chunk of retention."""
SCAN_CHUNK = 32
"""Steps between kept states of the selective scan."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Of one launch."""

    bytes: float
    fp: float = 0.0
    half: float = 0.0
    """Multiplications with an addition in mma.m16n8k16 of bf16 or fp16."""
    tf32: float = 0.0
    """In mma.m16n8k8."""
    special: float = 0.0
    """exp2 in a lane."""
    int8: float = 0.0
    """Additions and multiplications of int8, two a product."""


@dataclass(frozen=True)
class Call:
    """One call of an op: its sizes by letter, bytes of an element, and the kernels that it launches, in order."""

    sizes: dict[str, int]
    element: int
    causal: bool
    kernels: Sequence[str]


def sizes_of(sample: str) -> dict[str, int]:
    """Read ``B4 H8 K64 V64 L1024`` or ``2048x768``."""
    found = {letter: int(number) for letter, number in re.findall(r"\b([A-Z])(\d+)\b", sample)}
    if plain := re.fullmatch(r"(\d+)x(\d+)", sample):
        found = {"M": int(plain[1]), "K": int(plain[2])}
    return found


def whole(count: int, step: int) -> int:
    """Return the least multiple of a step that holds a count."""
    return -(-count // step) * step


def rk4(call: Call) -> Iterator[Work]:
    """Every array once."""
    numbers = call.sizes["M"] * call.sizes["K"]
    for kernel in call.kernels:
        arrays, fp = (6, 5) if kernel.startswith("combine") else (3, 1)
        yield Work(bytes=arrays * numbers * call.element, fp=fp * numbers)


def retention(call: Call) -> Iterator[Work]:
    """Forward: states of (k, v), output. Gradients: states of (v, grad), dq; states of (q, grad), dv, dk.

    Tensor cores take pieces: 16 columns of a key for scores and for what comes of a state, 8 columns of a value (32 of
    v), and 32 x 32 of a state.
    """
    B, L, H, K, V = (call.sizes[letter] for letter in "BLHKV")
    tokens, directions = B * H * L, 1 if call.causal else 2
    states = 4 * directions * B * H * (-(-L // CHUNK) - 1) * K * V
    outputs = iter([(K, V), (V, K), (K, V), (V, K)])
    for kernel in call.kernels:
        if kernel.startswith("retention_states"):  # one that sums up spans first does so for all spans but the last
            written = 0 if "true" in kernel else states
            moved = tokens * (K + V) * call.element + written
            if call.element == 2:
                yield Work(bytes=moved, tf32=directions * tokens * whole(K, 32) * whole(V, 32))
            else:
                yield Work(bytes=moved, fp=directions * tokens * K * V)
        else:
            key, value = next(outputs)
            moved = tokens * (2 * key + 2 * value) * call.element + states
            if call.element == 2:
                of_states = directions * tokens * whole(key, 16) * whole(value, 8)
                pairs = tokens * CHUNK * whole(value, 32)
                yield Work(bytes=moved, half=tokens * CHUNK * whole(key, 16), tf32=pairs + of_states)
            else:
                passes = whole(value, 64)  # columns are taken 64 at a time
                yield Work(bytes=moved, fp=tokens * CHUNK * (key + passes) + directions * tokens * key * passes)


def selective_scan(call: Call) -> Iterator[Work]:
    """Forward: 5 fp and an exp2 a step and state. Backward, 8 steps a thread: 3 for the states, 2 for the adjoints from
    nothing, then 4 and 7 from what enters, and 7 of 8 additions twice to sum over channels."""
    B, L, D, N = (call.sizes[letter] for letter in "BLDN")
    steps, kept = B * L * D, 4 * B * -(-L // SCAN_CHUNK) * N * D
    for kernel in call.kernels:
        if kernel.startswith("scan_forward"):
            moved = (4 * steps + 2 * B * L * N) * call.element + kept
            yield Work(bytes=moved, fp=5 * steps * N + 24 * steps, special=steps * (N + 4))
        else:
            moved = (7 * steps + 2 * B * L * N) * call.element + kept
            yield Work(bytes=moved, fp=17.75 * steps * N + 60 * steps, special=steps * (N + 8))


def bitlinear(call: Call) -> Iterator[Work]:
    """Of the gradients, what is ours: the two products are torch's."""
    M, K, N = (call.sizes[letter] for letter in "MKN")
    weight, x, element = 4 * N * K, M * K, call.element
    for kernel in call.kernels:
        name = kernel.partition("_")[0]
        if name == "quantize":
            yield Work(bytes=x * (element + 1), fp=4 * x)
        elif name == "absolute":
            yield Work(bytes=weight, fp=N * K)
        elif name == "pack":
            yield Work(bytes=weight + N * K / 4, fp=3 * N * K)
        elif name == "codes":
            yield Work(bytes=weight + N * K * element, fp=3 * N * K)
        elif name == "dequantize":
            yield Work(bytes=x * (element + 1), fp=x)
        elif name == "scale":
            yield Work(bytes=2 * x * element, fp=x)
        else:  # few_tokens, many_tokens
            yield Work(bytes=N * K / 4 + x + M * N * element, int8=2.0 * M * N * K)


WORK: dict[str, Callable[[Call], Iterator[Work]]] = {
    "ultrazoo::bitlinear": bitlinear,
    "ultrazoo::bitlinear_packed": bitlinear,
    "ultrazoo::retention": retention,
    "ultrazoo::rk4_combine": rk4,
    "ultrazoo::rk4_stage": rk4,
    "ultrazoo::selective_scan": selective_scan,
}
