"""The linear neural memory of Titans (arXiv 2501.00663): a matrix per head that learns while it reads.

Per head, with row vectors q_t, k_t of width K and v_t of width V, and the loss l(M; t) = ||k_t M - v_t||^2:

    u_t = 2 k_t^T (k_t G_t - v_t)             the surprise, the gradient of l at G_t
    S_t = eta_t S_{t-1} - theta_t u_t         momentum
    M_t = (1 - alpha_t) M_{t-1} + S_t         forgetting
    y_t = q_t M_t

G_t is the memory at the start of t's chunk of C tokens; with C = 1 it is M_{t-1}, the paper's recurrence. In a chunk
both recurrences are linear, so with P[t,i] = prod_{i<l<=t} (1 - alpha_l), E[i,j] = prod_{j<l<=i} eta_l and
W = (P E) diag(theta), both lower triangular, a chunk is a few matrix products:

    M_t = beta_t M_0 + f_t S_0 - sum_j W[t,j] u_j,    y = beta (Q M_0) + f (Q S_0) - 2 (Q K^T * W)(K G - V).

Chunks count from the start of each document, not of the row, so a document has the same memory wherever it stands. The
scan still walks the row in windows of C tokens: a window holds at most the end of one chunk begun before it, one chunk
of the same document begun inside it, and documents begun inside it, whose G is the initial memory. No token is moved.

This is the paper's memory of depth 1. A deeper one, an MLP, has a loss that is not quadratic in it and no such form.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ultrazoo.nn.bitlinear import make_linear
from ultrazoo.nn.conv import SegmentConv1d
from ultrazoo.nn.saturate import saturate
from ultrazoo.nn.segments import Gaps, positions


class _Window(NamedTuple):
    """Roles of the tokens of each window, as 0/1 floats (B, 1, windows, C); None where every row is one document."""

    same: Tensor  # (B or 1, 1, windows, C, C): query and key in one document, the key not later
    continues: Tensor  # of the document in progress when the window begins
    old_chunk: Tensor | None  # ... and of the chunk in progress
    new_chunk: Tensor | None  # ... and of a chunk begun inside the window
    boundary: Tensor | None  # the last token of the old chunk


def memory_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_keep: Tensor,
    log_eta: Tensor,
    theta: Tensor,
    initial: Tensor,
    *,
    segments: Tensor | None = None,
    chunk_size: int = 32,
) -> Tensor:
    """y_t = q_t M_t, the memory read after its own token is written, from the first token of a document to its last.

    Args:
        q: (B, L, H, K) queries.
        k: (B, L, H, K) keys; zero at padding.
        v: (B, L, H, V) values; zero at padding.
        log_keep: (B, L, H) log(1 - alpha), at most 0.
        log_eta: (B, L, H) log of the momentum, at most 0.
        theta: (B, L, H) step sizes.
        initial: (B or 1, H, K, V) the memory before a document's first token; the momentum there is 0.
        segments: (B, L) int64, or None.
        chunk_size: C, tokens whose surprise is taken at one memory.

    Returns:
        (B, L, H, V); what stands at padding has no meaning.
    """
    gaps = Gaps.of(segments)  # chunks and windows are places in the row
    q, k, v = gaps.close(q), gaps.close(k), gaps.close(v)
    log_keep, log_eta, theta = gaps.close(log_keep), gaps.close(log_eta), gaps.close(theta)
    segments = gaps.segments
    batch, length = q.shape[:2]
    if length == 0:
        return v
    chunk = min(chunk_size, length)
    extra = -length % chunk
    if extra:
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, extra)) for x in (q, k, v))
        log_keep, log_eta, theta = (F.pad(x, (0, 0, 0, extra)) for x in (log_keep, log_eta, theta))
        segments = None if segments is None else F.pad(segments, (0, extra))
    # (B, H, windows, C, ...)
    q, k, v, log_keep, log_eta, theta = (
        x.unflatten(1, (-1, chunk)).movedim(3, 1) for x in (q, k, v, log_keep, log_eta, theta)
    )
    roles = _roles(segments, length + extra, chunk, q)
    same, continues = roles.same, roles.continues

    keep = _segment_products(log_keep, same)  # P
    momentum = _segment_products(log_eta, same)  # E
    writes = (keep @ momentum) * theta.unsqueeze(-2)  # W
    beta = torch.exp((same @ log_keep.unsqueeze(-1)).squeeze(-1))  # own document's part of the window, up to t
    carried = torch.exp((same @ log_eta.unsqueeze(-1)).squeeze(-1)) * continues
    f = (keep @ carried.unsqueeze(-1)).squeeze(-1)
    step_memory = -2 * k * writes[..., -1, :].unsqueeze(-1)  # (B, H, windows, C, K)
    step_momentum = -2 * k * (momentum[..., -1, :] * theta).unsqueeze(-1)

    memories, momenta, errors = _walk(
        k, v, beta, f, carried, writes, step_memory, step_momentum, initial.expand(batch, -1, -1, -1), roles
    )
    y = (q * (beta * continues).unsqueeze(-1)) @ memories + (q * f.unsqueeze(-1)) @ momenta
    if segments is not None:
        y = y + (q * (beta * (1 - continues)).unsqueeze(-1)) @ initial.unsqueeze(2)
    y = y - 2 * ((q @ k.transpose(-1, -2)) * writes) @ errors
    return gaps.open(y.movedim(1, 3).flatten(1, 2)[:, :length])


def _segment_products(log_factor: Tensor, same: Tensor) -> Tensor:
    """[t, j] -> exp(logs of j+1 .. t, summed) where ``same``, else 0; no difference of sums, so nothing cancels."""
    chunk = log_factor.shape[-1]
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=log_factor.device).tril(-1)
    sums = log_factor.unsqueeze(-1).masked_fill(~later, 0).cumsum(-2)
    return torch.exp(sums) * same


def _roles(segments: Tensor | None, length: int, chunk: int, like: Tensor) -> _Window:
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=like.device).tril()
    if segments is None:
        continues = torch.ones(1, 1, length // chunk, chunk, dtype=like.dtype, device=like.device)
        return _Window(causal.to(like.dtype).expand(1, 1, length // chunk, chunk, chunk), continues, None, None, None)
    position = positions(segments, length).unflatten(1, (-1, chunk)).unsqueeze(1)  # (B, 1, windows, C)
    document = position.eq(0).cumsum(-1)  # 0 for the one in progress when the window begins
    same = causal & document.unsqueeze(-1).eq(document.unsqueeze(-2))
    continues = document.eq(0)
    first = position[..., :1]
    old_chunk = continues & (position // chunk).eq(first // chunk) & (first % chunk).ne(0)
    follows = F.pad(old_chunk[..., 1:], (0, 1))
    roles = (same, continues, old_chunk, continues & ~old_chunk, old_chunk & ~follows)
    return _Window(*(role.to(like.dtype) for role in roles))


def _walk(
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    f: Tensor,
    carried: Tensor,
    writes: Tensor,
    step_memory: Tensor,
    step_momentum: Tensor,
    initial: Tensor,
    roles: _Window,
) -> tuple[Tensor, Tensor, Tensor]:
    """Carry M and S from window to window.

    Returns:
        M and S at the start of each window (B, H, windows, K, V), and K G - V (B, H, windows, C, V).
    """
    memory, momentum, gradient_point = initial, torch.zeros_like(initial), initial
    memories, momenta, errors = [], [], []

    def scalars(x: Tensor) -> list[Tensor]:
        return list(x[..., None, None].unbind(2))  # per window (B, H, 1, 1)

    to_memory, to_momentum = step_memory.transpose(-1, -2).unbind(2), step_momentum.transpose(-1, -2).unbind(2)
    last_beta, last_f, last_carried = (scalars(x[..., -1]) for x in (beta, f, carried))
    if roles.boundary is None or roles.old_chunk is None or roles.new_chunk is None:
        for w, (k_w, v_w) in enumerate(zip(k.unbind(2), v.unbind(2), strict=True)):
            error = k_w @ memory - v_w
            memories.append(memory)
            momenta.append(momentum)
            errors.append(error)
            memory = last_beta[w] * memory + last_f[w] * momentum + to_memory[w] @ error
            momentum = last_carried[w] * momentum + to_momentum[w] @ error
        return torch.stack(memories, 2), torch.stack(momenta, 2), torch.stack(errors, 2)

    fresh = 1 - roles.continues
    k_old, k_new = k * roles.old_chunk.unsqueeze(-1), k * roles.new_chunk.unsqueeze(-1)
    known = (k * fresh.unsqueeze(-1)) @ initial.unsqueeze(2) - v
    # coefficients of the memory at the boundary between the chunk in progress and the one begun in the window
    none = 1 - roles.boundary.sum(-1)
    edge_beta, edge_f = scalars((beta * roles.boundary).sum(-1) + none), scalars((f * roles.boundary).sum(-1))
    edge_writes = (roles.boundary.unsqueeze(-2) @ writes).transpose(-1, -2)  # (B, H, windows, C, 1)
    to_edge = (-2 * k * edge_writes).transpose(-1, -2).unbind(2)
    last_old, last_new, last_fresh = (
        scalars(x[..., -1].expand(-1, beta.shape[1], -1)) for x in (roles.old_chunk, roles.new_chunk, fresh)
    )
    for w, (old_w, new_w, known_w) in enumerate(zip(k_old.unbind(2), k_new.unbind(2), known.unbind(2), strict=True)):
        error = old_w @ gradient_point + known_w
        edge = edge_beta[w] * memory + edge_f[w] * momentum + to_edge[w] @ error
        error = error + new_w @ edge
        memories.append(memory)
        momenta.append(momentum)
        errors.append(error)
        start = torch.where(last_fresh[w] > 0, initial, memory)
        memory = last_beta[w] * start + last_f[w] * momentum + to_memory[w] @ error
        momentum = last_carried[w] * momentum + to_momentum[w] @ error
        gradient_point = last_old[w] * gradient_point + last_new[w] * edge + last_fresh[w] * initial
    return torch.stack(memories, 2), torch.stack(momenta, 2), torch.stack(errors, 2)


def _unit(x: Tensor) -> Tensor:
    """x / |x|, with a bounded derivative at 0, where SiLU takes a vector of large negative numbers."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


class NeuralMemory(nn.Module):
    """y_t = q_t M_t read forwards plus backwards; q, k, v = SiLU(conv(x W)), q and k of unit length.

    Each head and direction has its own data-dependent gates: alpha = sigmoid(.), begun at 1/400 so that a memory lasts
    a few hundred tokens, eta = sigmoid(.), begun at 0.8, and theta = (1 - eta) sigmoid(.) / C. The last bounds a
    token's total effect through the momentum and shares the step among the C tokens whose surprise is taken at one
    memory: keys that are all alike, as those of masked tokens are, would otherwise overshoot C-fold. The memory before
    the first token is learned, from 0. Projections are shared by both directions. Gates and state stay in full
    precision.

    Args:
        hidden_size: D.
        num_heads: H; a divisor of D.
        chunk_size: C, tokens whose surprise is taken at one memory; 1 is the paper's token-by-token recurrence.
        conv_kernel: W, taps of the depthwise convolution after the projections, centred.
        initializer_range: Standard deviation of the initial projections.
        bitnet: Ternary projections.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        chunk_size: int = 32,
        conv_kernel: int = 3,
        initializer_range: float = 0.02,
        bitnet: bool = False,
    ) -> None:
        super().__init__()
        width = hidden_size // num_heads
        self.num_heads = num_heads
        self.chunk_size = chunk_size
        self.qkv = make_linear(hidden_size, 3 * hidden_size, bias=False, bitnet=bitnet)
        self.conv = SegmentConv1d(3 * hidden_size, 3 * hidden_size, conv_kernel, groups=3 * hidden_size, bias=False)
        self.gates = nn.Linear(hidden_size, 2 * 3 * num_heads)  # direction, (alpha, eta, theta), head
        self.initial = nn.Parameter(torch.zeros(2, num_heads, width, width))
        self.initial._no_weight_decay = True  # type: ignore[attr-defined]
        nn.init.normal_(self.qkv.weight, std=initializer_range)
        nn.init.normal_(self.gates.weight, std=initializer_range)
        with torch.no_grad():
            start = torch.tensor([-6.0, 1.4, 0.0])  # logits of alpha = 1/400, eta = 0.8, half of theta's bound
            self.gates.bias.copy_(start.view(1, 3, 1).expand(2, 3, num_heads).flatten())

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        """Write and read each document.

        Args:
            x: (B, L, D), finite at padding.
            segments: (B, L) int64, or None.

        Returns:
            (B, L, D) in fp32, or fp64 for fp64 x; what stands at padding has no meaning.
        """
        batch, length, _ = x.shape
        qkv = saturate(self.conv(saturate(self.qkv(x)), segments))
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            weight, bias = self.gates.weight.to(dtype), self.gates.bias.to(dtype)
            gates = F.linear(x.to(dtype), weight, bias).view(batch, length, 2, 3, self.num_heads)
            gates = torch.cat((gates[:, :, 0], gates[:, :, 1].flip(1)))  # (2B, L, 3, H)
            alpha, eta, theta = gates.unbind(2)
            theta = torch.sigmoid(-eta) * torch.sigmoid(theta) / self.chunk_size
            qkv = F.silu(qkv.to(dtype)).view(batch, length, 3, self.num_heads, -1)
            q, k, v = torch.cat((qkv, qkv.flip(1))).unbind(2)  # (2B, L, H, K)
            y = memory_scan(
                _unit(q),
                _unit(k),
                v,
                F.logsigmoid(-alpha),
                F.logsigmoid(eta),
                theta,
                self.initial.to(dtype).repeat_interleave(batch, dim=0),
                segments=None if segments is None else torch.cat((segments, segments.flip(1))),
                chunk_size=self.chunk_size,
            )
            forwards, backwards = y.split(batch)
            return (forwards + backwards.flip(1)).flatten(2)

    def statistics(self) -> dict[str, Tensor]:
        """What a token that says nothing of its own (x = 0) does to the memory.

        ``forget`` is the mean alpha, ``momentum`` the mean eta, ``retained_tokens`` the geometric mean of 1 / alpha.
        """
        alpha, eta, _ = self.gates.bias.detach().float().view(2, 3, self.num_heads).unbind(1)
        return {
            "forget": torch.sigmoid(alpha).mean(),
            "momentum": torch.sigmoid(eta).mean(),
            "retained_tokens": F.logsigmoid(alpha).mean().neg().exp(),
        }
