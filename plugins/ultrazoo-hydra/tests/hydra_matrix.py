"""The mixer written down: one matrix for each head of each document, entry by entry, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from ultrazoo_hydra.block import Hydra


def matrices(block: Hydra, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Write down the matrices of one document, x (L, D).

    Returns:
        M (H, L, L), u (L, H, P) after the convolution, and the gate z (L, E).
    """
    length, state, heads = x.shape[0], block.state, block.A_log.numel()
    z, u = (x @ block.in_proj.weight.T).chunk(2, dim=1)
    raw = x @ block.state_proj.weight.T
    steering, delta = raw[:, : 4 * state], F.softplus(raw[:, 4 * state :] + block.dt_bias.repeat(2))
    taps, channels = block.conv.weight.shape[2], u.shape[1] + 4 * state
    padded = F.pad(torch.cat((u, steering), dim=1).T, ((taps - 1) // 2, taps // 2))
    mixed = F.silu(F.conv1d(padded, block.conv.weight, block.conv.bias, groups=channels)).T
    u, B, C, B_back, C_back = mixed.split((u.shape[1], state, state, state, state), dim=1)
    own = u @ block.diagonal.weight.T + block.D  # (L, H)
    M = x.new_zeros(heads, length, length)
    for head in range(heads):
        rate = -block.A_log[head].exp()
        ahead, back = delta[:, head], delta[:, heads + head]
        for t in range(length):
            M[head, t, t] = own[t, head]
            for s in range(t):  # what stands before: read by the token before t
                decay = torch.exp(rate * ahead[s + 1 : t].sum())
                M[head, t, s] = (C[t - 1] @ B[s]) * ahead[s] * decay
            for s in range(t + 1, length):  # what stands after: read by the token after t
                decay = torch.exp(rate * back[t + 1 : s].sum())
                M[head, t, s] = (C_back[t + 1] @ B_back[s]) * back[s] * decay
    return M, u.unflatten(1, (heads, -1)), z


def hydra_by_matrices(block: Hydra, x: Tensor) -> Tensor:
    """The mixer on one document, (L, D) -> (L, D)."""
    M, u, z = matrices(block, x)
    y = torch.einsum("hts,shp->thp", M, u).flatten(1)
    normed = y * torch.rsqrt(y.square().mean(1, keepdim=True) + block.norm.eps) * block.norm.weight
    return (normed * F.silu(z)) @ block.out_proj.weight.T
