"""Valid, wrong and random arguments of the raw ops, drawn from a table of their signatures."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from fuzz_signatures import ATTENTION, SIGNATURES, Given, Number
from torch import Tensor

KERNEL = (torch.float32, torch.bfloat16, torch.float16)
OTHERS = (torch.float64, torch.int64, torch.int32, torch.bool, torch.float8_e4m3fn, torch.complex64)


@dataclass
class Case:
    """One call."""

    name: str
    direction: str
    arguments: dict[str, Any]
    wrong: str = ""
    """What is wrong with which argument."""
    reference_takes: bool = False
    """The reference takes it all the same: it knows fp64."""
    comparable: bool = True
    """The results follow from the arguments alone, whichever of them a backend reads."""


def make(name: str, direction: str, kind: str, rng: random.Random) -> Case:
    """Draw the arguments of a call."""
    signature = SIGNATURES[name, direction]
    sizes = _sizes(name, rng)
    if name == "attention":
        prefix = rng.choice((0, 0, 1, 5))
        sizes["M"] = [prefix + sizes["L"][0]]
    dtype = rng.choice(KERNEL)
    arguments = {key: _draw(given, sizes, dtype, rng) for key, given in signature.items()}
    if name == "attention":
        arguments["prefix"] = prefix
    case = Case(name, direction, arguments)
    if direction == "backward":
        _from_forward(case, sizes)
    if kind == "one wrong":
        key = rng.choice([key for key in signature if _can_be_wrong(signature[key])])
        here = {k: given for k, given in signature.items() if k == key or arguments[k] is not None}
        _spoil(case, key, here, sizes, dtype, rng)
    elif kind == "random":
        for key in rng.sample(list(signature), rng.randint(1, len(signature))):
            arguments[key] = _anything(signature[key], sizes, rng)
        # o, lse and states are no longer those of a forward with these arguments; backends read different parts of them
        case.comparable = (name, direction) not in (("attention", "backward"), ("selective_scan", "backward"))
    return case


def call(case: Case, arguments: dict[str, Any], backend: str) -> list[Tensor]:
    """Call the op's kernel or reference; results, or for ops without a backward of their own the gradients."""
    own = case.direction == "backward" and not case.name.startswith("rk4")
    op = getattr(getattr(torch.ops.ultrazoo, f"{case.name}_backward" if own else case.name), backend)
    values = list(arguments.values())
    if case.direction == "forward" or own:
        result = op(*values)
        if case.name == "selective_scan" and not own:  # of the states, some are multiplied by zero
            return [result[0]]
        return list(result) if isinstance(result, tuple) else [result]
    graded = [x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in values]
    inputs = [x for x in graded if isinstance(x, Tensor) and x.requires_grad]
    result = op(*graded)
    return list(torch.autograd.grad(result, inputs, torch.ones_like(result)))


def _sizes(name: str, rng: random.Random) -> dict[str, list[int]]:
    sizes = {symbol: [rng.choice((1, 2, 3, 7, 16, 17, 33))] for symbol in "DHKNV"}
    sizes["B"], sizes["L"] = [rng.choice((1, 2, 3))], [rng.choice((1, 2, 31, 32, 33, 64, 65, 100))]
    for symbol in "BLHKNV" if name in ("retention", "attention", "selective_scan") else "":
        if rng.random() < 0.03:
            sizes[symbol] = [0]
    sizes["*"] = [rng.choice((1, 2, 5, 9)) for _ in range(rng.randint(0, 3))]
    if rng.random() < 0.05:
        sizes["*"] = [0]
    sizes["H"] = [min(sizes["H"][0], 3)]
    sizes["I"], sizes["J"] = [-(-sizes["N"][0] // 16)], [-(-sizes["K"][0] // 16)]
    sizes["S"], sizes["Z"] = [-(-sizes["L"][0] // 32)], sizes["B"]
    return sizes


def _shape(given: Given, sizes: dict[str, list[int]]) -> list[int]:
    return [n for symbol in given.shape.split() for n in ([int(symbol)] if symbol.isdecimal() else sizes[symbol])]


def _draw(given: Given | Number, sizes: dict[str, list[int]], dtype: torch.dtype, rng: random.Random) -> Any:
    """Return a valid argument."""
    if isinstance(given, Number):
        return given.valid(rng)
    if given.optional and rng.random() < 0.4:
        return None
    return _numbers(given.kind, _shape(given, sizes), dtype, rng)


def _numbers(kind: str, shape: list[int], dtype: torch.dtype, rng: random.Random) -> Tensor:
    if kind == "seed":
        return torch.randint(-(1 << 62), 1 << 62, shape)
    if kind == "long":
        return _documents(shape, rng)
    if kind == "int8":
        return torch.randint(-128, 128, shape, dtype=torch.int8)
    if kind == "packed":
        pairs = torch.randint(0, 3, (*shape, 4))
        return (pairs << torch.tensor([0, 2, 4, 6])).sum(-1).to(torch.uint8)
    if kind == "negative":
        return -torch.rand(shape)
    x = torch.randn(shape)
    return x if kind == "wide" else x.to(rng.choice(KERNEL) if kind == "any" else dtype)


def _documents(shape: list[int], rng: random.Random) -> Tensor:
    """Return documents in a row, with padding on both sides and, in some rows, inside a document."""
    if len(shape) != 2:
        return torch.zeros(shape, dtype=torch.int64)
    rows = []
    for _ in range(shape[0]):
        left, right = rng.randint(0, shape[1]) // 3, rng.randint(0, shape[1]) // 3
        row = [1 + int(i * 4 / max(1, shape[1])) for i in range(shape[1])]
        gap = rng.randrange(3, shape[1]) if shape[1] > 3 and rng.random() < 0.3 else -1
        rows.append([n if left <= i < shape[1] - right and i != gap else 0 for i, n in enumerate(row)])
    return torch.tensor(rows, dtype=torch.int64).reshape(shape)


def _documents_that_return(segments: Tensor, rng: random.Random) -> Tensor:
    """Return segments with a negative number, or a document that returns after another one, in one row."""
    row = segments.clone()
    length = segments.shape[1]
    first = rng.randint(0, length - 3)
    numbers = rng.choice(((-1, 1, 1), (5, 6, 5), (6, 5, 6)))
    row[rng.randrange(len(row)), first : first + 3] = torch.tensor(numbers)
    return row


def _from_forward(case: Case, sizes: dict[str, list[int]]) -> None:
    """Replace what a backward gets from its forward by what the forward returns."""
    a = case.arguments
    if case.name == "selective_scan":
        inputs = list(a.values())[2:]
        a["states"] = torch.ops.ultrazoo.selective_scan.reference(*inputs)[1]
    elif case.name == "attention":
        inputs = [a[key] for key in ("q", "k", "v", *ATTENTION)]
        a["o"], a["lse"] = torch.ops.ultrazoo.attention.default(*inputs)
    elif case.name == "bitlinear":
        a["token_scale"] = a["token_scale"].abs() + 0.01


def _can_be_wrong(given: Given | Number) -> bool:
    return isinstance(given, Given) or bool(given.wrong)


def _spoil(
    case: Case,
    key: str,
    signature: dict[str, Given | Number],
    sizes: dict[str, list[int]],
    dtype: torch.dtype,
    rng: random.Random,
) -> None:
    """Make one argument wrong; ``signature`` is of the arguments that are given."""
    given = signature[key]
    if isinstance(given, Number):
        case.arguments[key] = rng.choice(given.wrong)
        case.wrong = f"{key} = {case.arguments[key]}"
        return
    x = case.arguments[key]
    if x is None:
        x = _numbers(given.kind, _shape(given, sizes), dtype, rng)
    how = rng.choice(("dtype", "shape", "shape", "device", "numbers"))
    tensors = [g for g in signature.values() if isinstance(g, Given) and g.kind != "seed"]
    if how == "device" and given.kind != "seed" and len(tensors) > 1:  # a seed may be elsewhere
        x = x.to("meta")
    elif how == "numbers" and given.kind == "long" and x.numel() and x.shape[1] > 2:
        x = _documents_that_return(x, rng)
    elif how == "shape" and (shape := _wrong_shape(key, signature, list(x.shape), rng)) is not None:
        x = _numbers(given.kind, shape, x.dtype, rng).to(x.dtype)
    else:
        x = x.to(rng.choice(_wrong_dtypes(given, signature, x.dtype)))
        alone = given.kind == "any" or sum(g.kind == "op" for g in tensors) == 1
        case.reference_takes = x.dtype == torch.float64 and alone
    case.arguments[key] = x
    case.wrong = f"{key}: {tuple(x.shape)} {x.dtype} on {x.device}"


def _wrong_dtypes(given: Given, signature: dict[str, Given | Number], right: torch.dtype) -> list[torch.dtype]:
    others = list(OTHERS)
    kinds = Counter(each.kind for each in signature.values() if isinstance(each, Given))
    if (given.kind == "op" and kinds["op"] > 1) or given.kind in ("wide", "negative"):
        others.extend(KERNEL)
    return [dtype for dtype in others if dtype != right]


def _wrong_shape(
    key: str, signature: dict[str, Given | Number], shape: list[int], rng: random.Random
) -> list[int] | None:
    """Return another shape, but for dimensions that only this argument has; None if every shape will do."""
    given = signature[key]
    assert isinstance(given, Given)
    symbols = given.shape.split()
    uses = Counter(symbol for each in signature.values() if isinstance(each, Given) for symbol in each.shape.split())
    if "*" in symbols and uses["*"] == 1 and len(symbols) == 1:
        return None
    if "*" not in symbols and rng.random() < 0.3:
        return [1, *shape] if rng.random() < 0.5 or not shape else shape[1:]
    front = len(shape) - len(symbols) + ("*" in symbols)
    derived = {"I", "J", "S", "Z", "1", "64"}
    names = [None] * front + symbols[len(symbols) - (len(shape) - front) :]
    fixed = [at for at in range(front, len(shape)) if uses[names[at]] > 1 or names[at] in derived]
    tiles = "I" in uses  # sizes count in tiles of 16
    fixed.extend(at for at in range(front, len(shape)) if tiles and names[at] in ("N", "K") and at not in fixed)
    if "*" in symbols and uses["*"] > 1:
        fixed.extend(range(front))
    if not fixed:
        return [*shape, 2] if "*" in symbols and uses["*"] > 1 else [1, *shape]
    at = rng.choice(fixed)
    changed = list(shape)
    near = [n for n in (shape[at] - 1, shape[at] + 1, 0) if n >= 0 and n != shape[at]]
    changed[at] = shape[at] + 64 if tiles and names[at] in ("N", "K") else rng.choice((*near, shape[at] + 64))
    return changed


def _anything(given: Given | Number, sizes: dict[str, list[int]], rng: random.Random) -> Any:
    """Return an argument that may fit."""
    if isinstance(given, Number):
        return rng.choice((given.valid(rng), *given.wrong))
    if given.optional and rng.random() < 0.2:
        return None
    shape = _shape(given, sizes)
    if rng.random() < 0.5:
        shape = [rng.choice((0, 1, 2, 3, 16, 33)) for _ in range(rng.randint(0, 5))]
    dtype = rng.choice((*KERNEL, *KERNEL, *OTHERS))
    x = _numbers(given.kind, shape, rng.choice(KERNEL), rng)
    return x if rng.random() < 0.5 else x.to(dtype)
