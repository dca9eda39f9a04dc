"""Text from hidden Markov chains, and the exact distribution of a masked token given all that is not masked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ultrazoo.data.randomness import draws, key

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Hmm:
    """z_1 ~ initial, z_t ~ transition[z_(t-1)], x_t ~ emission[z_t]."""

    initial: Floats
    """(S,), sums to 1."""
    transition: Floats
    """(S, S), rows sum to 1."""
    emission: Floats
    """(S, V), rows sum to 1."""

    def sample(self, draws_of_states: Floats, draws_of_symbols: Floats) -> Ints:
        """Return symbols (B, L) in [0, V).

        Args:
            draws_of_states: (B, L) uniform in [0, 1).
            draws_of_symbols: (B, L) uniform in [0, 1).
        """
        rows, length = draws_of_states.shape
        steps, symbols = self.transition.cumsum(1), self.emission.cumsum(1)
        found = np.empty((rows, length), dtype=np.int64)
        reached = np.broadcast_to(self.initial.cumsum(), (rows, self.initial.size))  # (B, S)
        for t in range(length):
            states = _pick(reached, draws_of_states[:, t])
            found[:, t] = _pick(symbols[states], draws_of_symbols[:, t])
            reached = steps[states]
        return found

    def posterior(self, symbols: Ints, masked: NDArray[np.bool_]) -> Floats:
        """p(x_t | every token that is not masked), at each position, by the forward-backward recursions.

        With a_t(s) = p(z_t = s | tokens before t) and b_t(s) proportional to p(tokens after t | z_t = s),
        p(x_t = v | ...) is proportional to sum_s a_t(s) b_t(s) emission[s, v]. Where the token itself is shown, this is
        what the others say of it.

        Args:
            symbols: (B, L) in [0, V); what stands at masked places is not read.
            masked: (B, L).

        Returns:
            (B, L, V), each sums to 1.
        """
        length = symbols.shape[1]
        seen = np.where(masked[:, :, None], 1.0, self.emission.T[np.where(masked, 0, symbols)])  # (B, L, S)
        before, after = np.empty_like(seen), np.empty_like(seen)
        before[:, 0] = self.initial
        for t in range(1, length):
            before[:, t] = _normalised(before[:, t - 1] * seen[:, t - 1]) @ self.transition
        after[:, -1] = 1.0
        for t in range(length - 2, -1, -1):
            after[:, t] = _normalised((after[:, t + 1] * seen[:, t + 1]) @ self.transition.T)
        return _normalised((before * after) @ self.emission)


def markov_chain(order: int, vocabulary: int, sharpness: float, *stream: int) -> Hmm:
    """A chain of an order as a hidden Markov model: a state is the last ``order`` symbols and shows the last of them.

    The logits of the next symbol are ``sharpness`` times draws from a standard normal; a row starts in the stationary
    distribution.

    Args:
        order: Symbols that the next one depends on, at least 1.
        vocabulary: Symbols V.
        sharpness: 0 makes every symbol equally likely.
        stream: Whole numbers that name the random stream.
    """
    states = vocabulary**order
    drawn = uniform((2, states, vocabulary), *stream)
    normal = np.sqrt(-2 * np.log1p(-drawn[0])) * np.cos(2 * np.pi * drawn[1])
    logits = sharpness * normal
    following = _normalised(np.exp(logits - logits.max(1, keepdims=True)))  # (S, V)
    transition = np.zeros((states, states))
    rows = np.repeat(np.arange(states), vocabulary)
    columns = (rows * vocabulary + np.tile(np.arange(vocabulary), states)) % states
    transition[rows, columns] = following.ravel()
    emission = np.eye(vocabulary)[np.arange(states) % vocabulary]
    return Hmm(stationary(transition), transition, emission)


def mixture(chains: list[Hmm]) -> Hmm:
    """A row follows one of several models, each equally likely, and no token says which."""
    sizes = [chain.initial.size for chain in chains]
    ends = np.cumsum(sizes)
    transition = np.zeros((ends[-1], ends[-1]))
    for chain, size, end in zip(chains, sizes, ends, strict=True):
        transition[end - size : end, end - size : end] = chain.transition
    initial = np.concatenate([chain.initial for chain in chains]) / len(chains)
    return Hmm(initial, transition, np.concatenate([chain.emission for chain in chains]))


def uniform(shape: tuple[int, ...], *stream: int) -> Floats:
    """Return floats in [0, 1), the same for the same whole numbers."""
    bits = draws(key(*stream), np.arange(np.prod(shape)))
    return (bits >> np.uint64(11)).astype(np.float64).reshape(shape) * 2.0**-53


def stationary(transition: Floats) -> Floats:
    """Solve p = p T, sum p = 1, for a chain that can reach every state."""
    size = transition.shape[0]
    system = np.vstack([transition.T - np.eye(size), np.ones(size)])
    solution = np.linalg.lstsq(system, np.append(np.zeros(size), 1.0), rcond=None)[0]
    return _normalised(np.clip(solution, 0.0, None))


def _pick(cumulative: Floats, drawn: Floats) -> Ints:
    """Invert distributions given by their cumulative sums (B, N) at uniform draws (B,); rounding never leaves N."""
    return np.minimum((cumulative <= drawn[:, None]).sum(1), cumulative.shape[1] - 1)


def _normalised(weights: Floats) -> Floats:
    total: Any = weights.sum(-1, keepdims=True)
    return weights / total
