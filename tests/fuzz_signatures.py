"""The arguments of the raw ops: shapes, kinds of numbers, and what numbers are wrong."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

HUGE = (math.nan, math.inf, -math.inf, 1e300)


@dataclass(frozen=True)
class Given:
    """A tensor argument: its shape in symbols, ``*`` for any dimensions in front, and what kind of numbers it has."""

    shape: str
    kind: str = "op"
    """op: the op's dtype; any: a kernel dtype of its own; wide: fp32; long: documents; seed; int8; packed."""
    optional: bool = False


@dataclass(frozen=True)
class Number:
    """A number: how a valid one is drawn, and wrong ones."""

    valid: Callable[[random.Random], Any]
    wrong: tuple[Any, ...] = ()


def _flag(rng: random.Random) -> bool:
    return rng.random() < 0.5


_EPS = Number(lambda rng: 10.0 ** rng.uniform(-8, -2), (0.0, -1.0, 1e-300, *HUGE))
_KEEP = Number(lambda rng: rng.choice((1, 32768, 60000, 65536)), (0, -1, 65537, 1 << 62, -(1 << 63)))
_FACTOR = Number(lambda rng: rng.uniform(-1, 1), HUGE)
_FLAG = Number(_flag)
_QKV = {"q": Given("B L H K"), "k": Given("B L H K"), "v": Given("B L H V")}
_SEGMENTS = Given("B L", "long", optional=True)
ATTENTION = {
    "segments": _SEGMENTS,
    "seed": Given("", "seed"),
    "keep": _KEEP,
    "scale": _FACTOR,
    "prefix": Number(lambda rng: 0, (-1, 1 << 62, -(1 << 63), 1 << 20)),
    "sigmoid": _FLAG,
}
_RETENTION = {
    "log_decay": Given("H", "negative"),
    "segments": _SEGMENTS,
    "causal": _FLAG,
    "chunk_size": Number(lambda rng: rng.choice((None, 1, 5, 64, 1000)), (0, -1, -(1 << 63))),
}
_SCAN = {
    "u": Given("B L D"),
    "delta": Given("B L D"),
    "A": Given("D N", "negative"),
    "B": Given("B L N"),
    "C": Given("B L N"),
    "D": Given("D", "wide", optional=True),
    "z": Given("B L D", optional=True),
    "delta_bias": Given("D", "wide", optional=True),
    "delta_softplus": Number(lambda rng: True),
    "segments": _SEGMENTS,
    "reverse": _FLAG,
}
_BIAS = Given("N", "any", optional=True)
_COMBINE = {"h": Given("*", "any"), **{f"k{i}": Given("*") for i in range(1, 5)}, "dt": _FACTOR}
_STAGE = {"h": Given("*", "any"), "k": Given("*", "any"), "c": _FACTOR}
_DROPOUT = {"seed": Given("", "seed"), "keep": _KEEP}

SIGNATURES: dict[tuple[str, str], dict[str, Given | Number]] = {
    ("retention", "forward"): {**_QKV, **_RETENTION},
    ("retention", "backward"): {"grad": Given("B L H V"), **_QKV, **_RETENTION},
    ("selective_scan", "forward"): _SCAN,
    ("selective_scan", "backward"): {"grad": Given("B L D"), "states": Given("B S N D", "wide"), **_SCAN},
    ("attention", "forward"): {"q": _QKV["q"], "k": Given("B M H K"), "v": Given("B M H V"), **ATTENTION},
    ("attention", "backward"): {
        "grad": Given("B L H V"),
        "q": _QKV["q"],
        "k": Given("B M H K"),
        "v": Given("B M H V"),
        "o": Given("B L H V"),
        "lse": Given("Z H L", "wide"),
        **ATTENTION,
    },
    ("bitlinear", "forward"): {"x": Given("* K"), "weight": Given("N K", "any"), "bias": _BIAS, "eps": _EPS},
    ("bitlinear", "backward"): {
        "grad": Given("* N"),
        "integers": Given("* K", "int8"),
        "token_scale": Given("* 1", "wide"),
        "weight": Given("N K", "any"),
        "eps": _EPS,
    },
    ("bitlinear_packed", "forward"): {
        "x": Given("* K"),
        "packed": Given("I J 64", "packed"),
        "scale": Given("N", "wide"),
        "bias": _BIAS,
        "eps": _EPS,
    },
    ("dropout", "forward"): {"x": Given("*"), **_DROPOUT},
    ("dropout", "backward"): {"grad": Given("*"), **_DROPOUT},
    ("rk4_combine", "forward"): _COMBINE,
    ("rk4_combine", "backward"): _COMBINE,
    ("rk4_stage", "forward"): _STAGE,
    ("rk4_stage", "backward"): _STAGE,
}
DIRECTIONS = list(SIGNATURES)
