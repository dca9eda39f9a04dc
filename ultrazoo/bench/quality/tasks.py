"""The tasks: random rows with masked tokens, and for each masked token the best prediction that there is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ultrazoo.bench.quality.markov import Hmm, markov_chain, mixture, uniform
from ultrazoo.errors import ConfigError, UnknownNameError
from ultrazoo.model import IGNORED

SEPARATOR, MASK, FIRST = 3, 4, 5
"""The special tokens in use, with their ids in every ultrazoo vocabulary, and the first id after them."""
KEYS, VALUES = 32, 16
"""Recall: keys to draw from at least, and values."""
CONTENT = 16
"""Copy: tokens that count."""
CHAINS, SYMBOLS, SHARPNESS, MASKED = 4, 8, 2.0, 0.25
"""Markov: chains that a row may follow, symbols, spread of the logits, share of masked tokens."""
MARKOV_LENGTH = 32
_WORLD = 0x5EED
"""Names the stream that the transition probabilities come from: the language is the same for every seed."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Examples:
    """Rows of one draw."""

    tokens: Ints
    """(B, L)."""
    labels: Ints
    """(B, L), -100 where there is no target."""


class Task(Protocol):
    """A distribution over rows."""

    @property
    def name(self) -> str:
        """As on the command line."""
        ...

    @property
    def vocab_size(self) -> int:
        """Ids, special tokens included."""
        ...

    def draw(self, rows: int, *stream: int) -> Examples:
        """Return rows named by whole numbers: the same numbers, the same rows."""
        ...

    def posterior(self, examples: Examples) -> Floats:
        """Return (M, vocab_size): the distribution of each target, in reading order, given all that is shown."""
        ...


@dataclass(frozen=True)
class Recall:
    """k_1 v_1 ... k_n v_n, then the keys in another order, each followed by a mask: which value went with the key?

    Keys of a row differ, values are drawn anew for each row, so nothing can be learned by heart. The optimum is 100 %,
    0 nats; guessing among the row's own values gives about ln n nats.
    """

    pairs: int = 8

    @property
    def name(self) -> str:
        return f"recall:{self.pairs}"

    @property
    def keys(self) -> int:
        """Keys to draw from."""
        return max(KEYS, 2 * self.pairs)

    @property
    def vocab_size(self) -> int:
        return FIRST + self.keys + VALUES

    def draw(self, rows: int, *stream: int) -> Examples:
        keys = FIRST + _orders(rows, self.keys, *stream, 0)[:, : self.pairs]
        values = FIRST + self.keys + _choices(rows, self.pairs, VALUES, *stream, 1)
        asked = _orders(rows, self.pairs, *stream, 2)
        told = np.stack([keys, values], axis=2).reshape(rows, -1)
        answers = np.take_along_axis(values, asked, axis=1)
        masks = np.full_like(answers, MASK)
        questions = np.stack([np.take_along_axis(keys, asked, axis=1), masks], axis=2).reshape(rows, -1)
        labels = np.full((rows, 4 * self.pairs), IGNORED)
        labels[:, 2 * self.pairs + 1 :: 2] = answers
        return Examples(np.concatenate([told, questions], axis=1), labels)

    def posterior(self, examples: Examples) -> Floats:
        told, asked = np.split(examples.tokens, 2, axis=1)
        same = asked[:, 0::2, None] == told[:, None, 0::2]  # (B, n, n)
        values = np.take_along_axis(told[:, 1::2], same.argmax(2), axis=1)
        return _certain(values, self.vocab_size)


@dataclass(frozen=True)
class Copy:
    """n content tokens scattered in 2 n of noise, a separator, then a mask for each of them: say them again, in order.

    Where they stand is drawn anew for each row, so a fixed shift does not do. The optimum is 100 %, 0 nats.
    """

    tokens: int = 4

    @property
    def name(self) -> str:
        return f"copy:{self.tokens}"

    @property
    def span(self) -> int:
        """Tokens before the separator."""
        return 3 * self.tokens

    @property
    def vocab_size(self) -> int:
        return FIRST + 1 + CONTENT

    def draw(self, rows: int, *stream: int) -> Examples:
        span = self.span
        places = np.sort(_orders(rows, span, *stream, 0)[:, : self.tokens], axis=1)
        content = FIRST + 1 + _choices(rows, self.tokens, CONTENT, *stream, 1)
        tokens = np.full((rows, span + 1 + self.tokens), FIRST)
        np.put_along_axis(tokens, places, content, axis=1)
        tokens[:, span], tokens[:, span + 1 :] = SEPARATOR, MASK
        labels = np.full_like(tokens, IGNORED)
        labels[:, span + 1 :] = content
        return Examples(tokens, labels)

    def posterior(self, examples: Examples) -> Floats:
        shown = examples.tokens[:, : self.span]
        content = shown[shown != FIRST].reshape(-1, self.tokens)
        return _certain(content, self.vocab_size)


class Markov:
    """Rows of Markov chains of an order; which of four chains a row follows is to be found out. A quarter is masked.

    What a masked token may be depends on its neighbours, past other masks, and on the row's chain, which every other
    token hints at. The exact posterior comes from forward-backward, and its entropy is the least loss there is.
    """

    def __init__(self, order: int = 1) -> None:
        self.order = order
        self.model: Hmm = mixture([markov_chain(order, SYMBOLS, SHARPNESS, _WORLD, i, order) for i in range(CHAINS)])

    @property
    def name(self) -> str:
        return f"markov:{self.order}"

    @property
    def vocab_size(self) -> int:
        return FIRST + SYMBOLS

    def draw(self, rows: int, *stream: int) -> Examples:
        states, symbols, masks = (uniform((rows, MARKOV_LENGTH), *stream, i) for i in range(3))
        text = FIRST + self.model.sample(states, symbols)
        masked = masks < MASKED
        masked[:, 0] |= ~masked.any(1)
        return Examples(np.where(masked, MASK, text), np.where(masked, text, IGNORED))

    def posterior(self, examples: Examples) -> Floats:
        masked = examples.tokens == MASK
        of_symbols = self.model.posterior(examples.tokens - FIRST, masked)[masked]  # (M, SYMBOLS)
        return np.pad(of_symbols, ((0, 0), (FIRST, 0)))


TASKS: dict[str, tuple[Callable[[int], Task], str, int, int]] = {
    "recall": (Recall, "pairs", 1, 256),
    "copy": (Copy, "tokens", 1, 64),
    "markov": (Markov, "order", 1, 3),
}
"""Name -> class, what the number after the colon is, its least and greatest value."""
DEFAULT_TASKS = ("recall:8", "copy:4", "markov:1")


def find_task(text: str) -> Task:
    """Return the task ``NAME`` or ``NAME:NUMBER``, as in ``recall:32``.

    Raises:
        UnknownNameError: No task has that name.
        ConfigError: The number is none, or out of range.
    """
    name, colon, number = text.partition(":")
    if name not in TASKS:
        raise UnknownNameError("--task", name, TASKS)
    build, meaning, least, greatest = TASKS[name]
    if not colon:
        number = next(default for default in DEFAULT_TASKS if default.startswith(name)).partition(":")[2]
    if not number.isdecimal() or not least <= int(number) <= greatest:
        raise ConfigError(f"--task: got {text!r}, expected {name}:N, N the {meaning}, from {least} to {greatest}")
    return build(int(number))


def _choices(rows: int, columns: int, count: int, *stream: int) -> Ints:
    return (uniform((rows, columns), *stream) * count).astype(np.int64)


def _orders(rows: int, count: int, *stream: int) -> Ints:
    """A permutation of ``range(count)`` for each row."""
    return np.argsort(uniform((rows, count), *stream), axis=1, kind="stable")


def _certain(values: Ints, vocab_size: int) -> Floats:
    """All probability on one token for each target."""
    return np.eye(vocab_size)[values.ravel()]
