"""The errors that ultrazoo raises. Every message says where, what was got, what was expected and a hint."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST_NAME = 100
"""Characters of a name for which a similar one is looked for."""


class UltrazooError(Exception):
    """Base of every error that a user can cause or cure."""

    exit_code = 1


class ConfigError(UltrazooError):
    """A configuration cannot be used as it is."""

    exit_code = 2


class ArgumentError(UltrazooError, ValueError):
    """An argument of a function is out of bounds."""

    exit_code = 2


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument of a function has another type than documented."""


class UnknownNameError(ConfigError):
    """A block, op, preset or field name is not known."""

    def __init__(self, where: str, got: str, known: Iterable[str], cure: str | None = None) -> None:
        names = sorted(known)
        hint = did_you_mean(got, names) if cure is None else cure
        super().__init__(f"{where}: unknown name {shortened(repr(got))}; {hint}known: {', '.join(names) or 'none'}")


class PluginError(UltrazooError):
    """A plugin distribution is broken; the message names it and its version."""


class KernelUnavailableError(UltrazooError):
    """A compiled kernel was demanded and cannot be used; the message has the reason and the fix."""


class DataError(UltrazooError):
    """Training data cannot be read as asked."""


class CheckpointError(UltrazooError):
    """A checkpoint is missing, damaged or made for something else."""


class NonFiniteError(UltrazooError):
    """A loss or gradient stopped being finite; the weights are those before the step."""

    exit_code = 3


def shortened(text: str, most: int = 200) -> str:
    """Return a text, or its first ``most`` characters and how many there are."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def did_you_mean(got: str, known: Iterable[str]) -> str:
    """Return ``"did you mean 'x'? "`` for the nearest known name, or an empty string."""
    if len(got) > LONGEST_NAME:
        return ""
    near = difflib.get_close_matches(got, list(known), n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}? " if near else ""
