"""What the samples of an op must cover: what no sample shows, no comparison of a kernel with its reference proves."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from torch import Tensor

from ultrazoo.spec import OpSpec, Sample

LANES = 16
"""fp32 numbers in the widest vector of a CPU (AVX-512)."""
RANDOM = ("seed", "generator")
"""Arguments that are random when left out, so that no two calls could be compared."""
PACKED = "segments=torch.tensor([[1, 1, 1, 2, 2, 0], [3, 3, 3, 3, 3, 3]])"

Call = dict[str, Any]
"""The arguments of a sample by name."""


@dataclass(frozen=True)
class Layout:
    """How the tensors of an op are laid out, as its samples show it."""

    lead: str
    """The first tensor."""
    rows: bool
    """Axis 0 is the batch and axis 1 the length; otherwise all axes but the last are tokens."""
    per_token: tuple[str, ...]
    """Floating-point arguments with the batch and length (or the tokens) of the first tensor."""

    def tokens(self, call: Call) -> tuple[int, ...]:
        """Return batch and length, or all axes but the last, of the first tensor."""
        shape: tuple[int, ...] = tuple(call[self.lead].shape)
        return shape[:2] if self.rows else shape[:-1]

    def fits(self, call: Call) -> bool:
        """Whether every argument for each token has the tokens of the first one in this call."""
        tokens = self.tokens(call)
        given = [call[name] for name in self.per_token if call.get(name) is not None]
        return all(tuple(value.shape[: len(tokens)]) == tokens for value in given)


def layout_of(spec: OpSpec, calls: Sequence[Call]) -> Layout:
    """Read the layout of an op's tensors from its samples.

    With an argument ``segments``, or when the first tensor has three axes or more in every sample, the first two axes
    are batch and length. An argument counts as one for each token if that holds in most samples.

    Raises:
        ValueError: A sample has no tensor.
    """
    for call in calls:
        if not any(isinstance(value, Tensor) for value in call.values()):
            raise ValueError(f"{spec.name}: got a sample without a tensor, expected a tensor as the first argument")
    lead = next(name for name, value in calls[0].items() if isinstance(value, Tensor))
    rows = "segments" in inspect.signature(spec.op).parameters or all(call[lead].dim() > 2 for call in calls)
    votes: dict[str, list[bool]] = {}
    for call in calls:
        tokens = tuple(call[lead].shape[: 2 if rows else -1])
        for name, value in call.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                votes.setdefault(name, []).append(tuple(value.shape[: len(tokens)]) == tokens)
    return Layout(lead, rows, tuple(name for name, fits in votes.items() if 2 * sum(fits) > len(fits)))


def calls_of_samples(spec: OpSpec, samples: Sequence[Sample]) -> list[Call]:
    """Return the arguments of every sample by name, those left out at their defaults."""
    calls = []
    for sample in samples:
        bound = inspect.signature(spec.op).bind(*sample.args, **sample.kwargs)
        bound.apply_defaults()
        calls.append(dict(bound.arguments))
    return calls


def missing(spec: OpSpec, samples: Sequence[Sample]) -> list[str]:
    """Return what the samples of an op lack, each with what to add; docs/conformance.md has the rule."""
    calls = calls_of_samples(spec, samples)
    if not calls:
        return ["any sample"]
    layout = layout_of(spec, calls)
    full = [call for call in calls if call[layout.lead].numel() > 0]
    return [*_sizes(layout, calls), *_segments(layout, full), *_options(spec, full)]


def _sizes(layout: Layout, calls: list[Call]) -> Iterator[str]:
    name = layout.lead
    seen = [layout.tokens(call) for call in calls]
    needed: list[tuple[str, str, Callable[[tuple[int, ...]], bool]]]
    if layout.rows:
        needed = [
            ("length 0", f"{name} of shape (2, 0, ...)", lambda s: s[0] > 0 and s[1] == 0),
            ("length 1", f"{name} of shape (2, 1, ...)", lambda s: s[0] > 0 and s[1] == 1),
            ("batch 0", f"{name} of shape (0, 5, ...)", lambda s: s[0] == 0 and s[1] > 0),
            ("several rows of several tokens", f"{name} of shape (3, 7, ...)", lambda s: s[0] > 1 and s[1] > 1),
        ]
    else:
        needed = [
            ("no token", f"{name} of shape (0, 5)", lambda s: 0 in s),
            ("one token", f"{name} of shape (1, 5)", lambda s: 0 not in s and all(n == 1 for n in s)),
            ("several tokens", f"{name} of shape (3, 5)", lambda s: 0 not in s and any(n > 1 for n in s)),
        ]
    yield from (f"{what} ({add})" for what, add, shown in needed if not any(map(shown, seen)))
    for argument in layout.per_token:
        widths = [call[argument].shape[-1] for call in calls if _is_wide(call.get(argument))]
        if not any(width > LANES and width % LANES for width in widths):
            add = f"a last axis above {LANES} and no multiple of it, such as {LANES + 3}"
            yield f"a width of {argument} beyond one vector ({add})"


def _is_wide(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() > 0 and value.dim() > 0


def _segments(layout: Layout, calls: list[Call]) -> Iterator[str]:
    if not calls or "segments" not in calls[0]:
        return
    given = [call["segments"] for call in calls if call["segments"] is not None]
    rows = [row for segments in given for row in segments.tolist()]
    if len(given) == len(calls):
        yield "segments left out (segments=None)"
    if not any(_documents(row) > 1 and len(row) - row.count(0) > _documents(row) for row in rows):
        yield f"packed rows, with two documents in a row ({PACKED})"
    if not any(0 in row and any(row) for row in rows):
        yield f"padded rows, with tokens and zeros in a row ({PACKED})"
    if not any((segments != segments[:1]).any() for segments in given):
        yield f"a batch whose rows have different documents ({PACKED})"


def _documents(row: list[int]) -> int:
    return len({number for number in row if number > 0})


def _options(spec: OpSpec, calls: list[Call]) -> Iterator[str]:
    """Each flag on and off, each choice of a Literal, and each optional argument given and left out."""
    for name, parameter in inspect.signature(spec.op).parameters.items():
        seen = [call[name] for call in calls if name in call]
        hint = _annotation(spec, name)
        if hint is bool or isinstance(parameter.default, bool):
            yield from (f"{name}={choice} in a call with tokens" for choice in (False, True) if choice not in seen)
        elif get_origin(hint) is Literal:
            yield from (f"{name}={choice!r} in a call with tokens" for choice in get_args(hint) if choice not in seen)
        elif parameter.default is None and name != "segments":
            if all(value is None for value in seen):
                yield f"{name} given in a call with tokens"
            if name not in RANDOM and not any(value is None for value in seen):
                yield f"{name} left out in a call with tokens"


def _annotation(spec: OpSpec, name: str) -> Any:
    try:
        return typing.get_type_hints(spec.op).get(name)
    except (NameError, TypeError, AttributeError):  # names that are imported for type checkers alone
        return inspect.signature(spec.op).parameters[name].annotation
