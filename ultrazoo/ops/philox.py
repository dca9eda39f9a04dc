"""Philox4x32-10 (Salmon et al. 2011) in plain torch: the random numbers of dropout, a function of seed and counter.

A block of 128 bits decides on 8 elements: slot 2 w is the low half of word w, slot 2 w + 1 the high one, and an
element is kept where its 16 bits are below ``keep``, a number of 65536ths. The kernels draw the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10
FACTORS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
LOW = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turn counters into random words.

    Args:
        counter: Four int64 tensors that broadcast, each number below 2^32.
        seed: 0-dim int64, the two words of the key, the low one first.

    Returns:
        Four int64 tensors, uniform on [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    keys = [seed & LOW, (seed >> 32) & LOW]
    for _ in range(ROUNDS):
        a, b = c0 * FACTORS[0], c2 * FACTORS[1]  # modulo 2^64, as signed numbers
        c0, c1 = ((b >> 32) & LOW) ^ c1 ^ keys[0], b & LOW
        c2, c3 = ((a >> 32) & LOW) ^ c3 ^ keys[1], a & LOW
        keys = [(key + step) & LOW for key, step in zip(keys, KEY_STEPS, strict=True)]
    return c0, c1, c2, c3


def slots(words: tuple[Tensor, ...]) -> Tensor:
    """Return the 8 draws of each block, (8, ...) int64 in [0, 65536)."""
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(torch.broadcast_tensors(*halves))


def kept_of_65536(p: float) -> int:
    """Return the number of 65536ths nearest to 1 - p that is at least one."""
    return max(1, round((1 - p) * 65536))


def draw_seed() -> Tensor:
    """Draw a seed, 0-dim int64 on the CPU, from torch's global generator."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64)
