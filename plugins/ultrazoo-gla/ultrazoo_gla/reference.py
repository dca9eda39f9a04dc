"""Gated linear attention in plain torch: the chunkwise form that runs, and the two forms that define it.

Rightwards a state S (K, V) is gated and takes in one token after the other, leftwards another one, T:

    S_n = diag(a_n) S_n-1 + k_n v_n^T        T_n = diag(b_n) T_n+1 + k_n v_n^T        a = exp(log_gate), b likewise
    o_n = q_n S_n  (causal)                  o_n = q_n S_n + q_n diag(b_n) T_n+1      (the token itself counted once)

so that o_n = sum_m sum_j q_nj k_mj w_nmj v_m, where w_nmj is the product of a_ij over m < i <= n for what stands
before, of b_ij over n <= i < m for what stands after, and 1 for m = n. Each document begins with empty states.

q, k (B, L, H, K), v (B, L, H, V), log_gate (B, L, D, H, K) with D = 1 direction (rightwards) or 2 (rightwards,
leftwards), segments (B, L) with 0 at padding. Everything is computed in fp32, or in fp64 for fp64 inputs, and rounded
once. A sweep leftwards is a sweep rightwards over the tokens in reverse. Chunkwise, 16 tokens at a time: the logarithms
of the gates between two tokens of a chunk are summed for each pair, never as a difference of two sums, so no exponent
is positive and none is lost to cancellation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ultrazoo.nn.segments import Gaps, checked, mask_padding, starts

CHUNK = 16


def gated_linear_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, segments: Tensor | None
) -> Tensor:
    """o_n = sum_m sum_j q_nj k_mj w_nmj v_m, chunk by chunk.

    Returns:
        (B, L, H, V), contiguous, in the dtype of q.
    """
    gaps = Gaps.of(segments)
    q, k, v, log_gate, segments = *(gaps.close(x) for x in (q, k, v, log_gate)), gaps.segments
    o = v.new_zeros(v.shape, dtype=_wide(q))
    with torch.autocast(q.device.type, enabled=False):
        for sweep in _sweeps(q, k, v, log_gate, segments):
            state = sweep.empty_state()
            for chunk in sweep.chunks():
                sweep.place(o)[chunk.where] += chunk.scores @ chunk.v + (chunk.q * chunk.entering) @ state
                state = chunk.pass_on(state)
    return gaps.open(o.to(q.dtype))


def gated_linear_attention_backward_reference(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, segments: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and log_gate, chunk by chunk.

    With p_nm = grad_n . v_m and s_nm the score: dq_n = sum_m p_nm k_m w_nm, dk_m = sum_n p_nm q_n w_nm and
    dv_m = sum_n s_nm grad_n. Beyond the chunk, dq reads the state that enters, dk and dv the gradient of the state that
    leaves. log a_i takes part in every pair m < i <= n: the sum of q dq - k dk from i to the end of the chunk (pairs on
    one side of i cancel), and state . dstate for the pairs that reach beyond it.
    """
    gaps = Gaps.of(segments)
    grad, q, k, v, log_gate, segments = *(gaps.close(x) for x in (grad, q, k, v, log_gate)), gaps.segments
    dq, dk, dv = (x.new_zeros(x.shape, dtype=_wide(q)) for x in (q, k, v))
    dlog_gate = log_gate.new_zeros(log_gate.shape)
    with torch.autocast(q.device.type, enabled=False):
        for direction, sweep in enumerate(_sweeps(q, k, v, log_gate, segments)):
            g = sweep.place(mask_padding(grad.to(_wide(q)), segments))
            states = [sweep.empty_state()]
            for chunk in sweep.chunks():
                states.append(chunk.pass_on(states[-1]))
            dstate = sweep.empty_state()  # the gradient of the state that leaves the chunk
            for chunk in reversed(list(sweep.chunks())):
                after = states.pop()
                entered, gc = states[-1], g[chunk.where]
                p = (gc @ chunk.v.mT) * chunk.visible
                weighted = p.unsqueeze(-1) * chunk.within  # (B, H, n, m, K)
                dqc = (weighted * chunk.k.unsqueeze(-3)).sum(-2) + chunk.entering * (gc @ entered.mT)
                dkc = (weighted * chunk.q.unsqueeze(-2)).sum(-3) + chunk.leaving * (chunk.v @ dstate.mT)
                sweep.place(dq)[chunk.where] += dqc
                sweep.place(dk)[chunk.where] += dkc
                sweep.place(dv)[chunk.where] += chunk.scores.mT @ gc + (chunk.k * chunk.leaving) @ dstate
                passed = (chunk.q * dqc - chunk.k * dkc).flip(-2).cumsum(-2).flip(-2)
                beyond = (after * dstate).sum(-1).unsqueeze(-2)
                dgate = (passed + beyond).masked_fill(chunk.log_gate.isneginf(), 0)
                sweep.place(dlog_gate[:, :, direction])[chunk.where] = dgate
                dstate = chunk.entering[..., -1, :, None] * dstate + (chunk.q * chunk.entering).mT @ gc
    return gaps.open(dq.to(q.dtype)), gaps.open(dk.to(k.dtype)), gaps.open(dv.to(v.dtype)), gaps.open(dlog_gate)


@dataclass(frozen=True)
class _Sweep:
    """One direction over (B, H, L, ...) tensors, whose tokens stand in the order in which it meets them."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_gate: Tensor
    """-inf at the first token of each document: nothing enters one."""
    leftwards: bool

    def place(self, x: Tensor) -> Tensor:
        """A view of (B, L, H, ...) as (B, H, L, ...), indexed by ``_Chunk.where``."""
        return x.transpose(1, 2)

    def empty_state(self) -> Tensor:
        B, H, _, K = self.k.shape
        return self.k.new_zeros(B, H, K, self.v.shape[3])

    def chunks(self) -> Iterator[_Chunk]:
        length = self.q.shape[2]
        for start in range(0, length, CHUNK):
            index = torch.arange(start, min(start + CHUNK, length), device=self.q.device)
            if self.leftwards:
                index = length - 1 - index
            parts = (x.index_select(2, index) for x in (self.q, self.k, self.v, self.log_gate))
            yield _Chunk(*parts, where=(slice(None), slice(None), index), strict=self.leftwards)


class _Chunk:
    """n tokens: (B, H, n, ...), in the order of the sweep."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, *, where: tuple[slice, slice, Tensor], strict: bool
    ) -> None:
        self.q, self.k, self.v, self.log_gate, self.where = q, k, v, log_gate, where
        n = q.shape[2]
        pairs = torch.ones(n, n, dtype=torch.bool, device=q.device)  # (reader, token read)
        self.visible = pairs.tril(-1 if strict else 0)
        passed = log_gate.unsqueeze(-2).expand(*log_gate.shape[:-1], n, log_gate.shape[-1])
        passed = passed.masked_fill(~pairs.tril(-1).unsqueeze(-1), 0).cumsum(-3)  # gates after m, up to and with n
        self.within = passed.exp()  # (B, H, n, n, K)
        self.entering = log_gate.cumsum(-2).exp()  # gates from before the chunk, up to and with n
        self.leaving = self.within[..., -1, :, :]  # gates after m, up to the chunk's last
        weighted = (self.q.unsqueeze(-2) * self.k.unsqueeze(-3) * self.within).sum(-1)
        self.scores = weighted * self.visible  # (B, H, n, n)

    def pass_on(self, state: Tensor) -> Tensor:
        """diag(gates of the chunk) state + sum_m (k_m gates after m) v_m^T."""
        return self.entering[..., -1, :, None] * state + (self.k * self.leaving).mT @ self.v


def _sweeps(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, segments: Tensor | None) -> Iterator[_Sweep]:
    """The sweeps, rightwards first; what stands at padding is dropped."""
    q, k, v = (mask_padding(x.to(_wide(x)), segments).transpose(1, 2) for x in (q, k, v))
    for direction in range(log_gate.shape[2]):
        leftwards = direction == 1
        gate = log_gate[:, :, direction].masked_fill(_firsts(q, segments, leftwards)[..., None, None], -torch.inf)
        yield _Sweep(q, k, v, gate.transpose(1, 2), leftwards)


def _firsts(q: Tensor, segments: Tensor | None, leftwards: bool) -> Tensor:
    """Where a sweep enters a document, and padding; (B, L) bool."""
    documents = q.new_ones(q.shape[0], q.shape[2], dtype=torch.int64) if segments is None else segments
    return starts(documents.flip(1)).flip(1) if leftwards else starts(documents)


def gated_linear_attention_recurrent(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, segments: Tensor | None = None
) -> Tensor:
    """The definition: the states S and T of the module's first lines, token by token."""
    q, k, v, gate = (x.to(_wide(x)) for x in (q, k, v, log_gate.exp()))
    documents = q.new_ones(q.shape[:2], dtype=torch.int64) if segments is None else checked(segments)
    o = torch.zeros_like(v)
    for direction in range(log_gate.shape[2]):
        state = v.new_zeros(*k.shape[:1], *k.shape[2:], v.shape[3])  # (B, H, K, V)
        previous = documents.new_zeros(q.shape[0])
        for n in sorted(range(q.shape[1]), reverse=direction == 1):
            same, real = documents[:, n].eq(previous), documents[:, n].ne(0)[:, None, None, None]
            seen = torch.where(same[:, None, None, None], gate[:, n, direction].unsqueeze(-1) * state, 0)
            written = seen + k[:, n].unsqueeze(-1) * v[:, n].unsqueeze(-2)
            o[:, n] += torch.einsum("bhk,bhkv->bhv", q[:, n], written if direction == 0 else seen)
            state = torch.where(real, written, state)  # over padding it passes unchanged
            previous = torch.where(documents[:, n].ne(0), documents[:, n], previous)
    return mask_padding(o, segments)


def gated_linear_attention_matrix(q: Tensor, k: Tensor, log_gate: Tensor, segments: Tensor | None = None) -> Tensor:
    """The matrix M (B, H, L, L) with o = M v, entry by entry from the products of gates."""
    B, L, H, _ = q.shape
    documents = q.new_ones((B, L), dtype=torch.int64) if segments is None else checked(segments)
    gate = log_gate.exp().masked_fill(documents.eq(0)[:, :, None, None, None], 1)
    M = q.new_zeros(B, H, L, L)
    for n in range(L):
        for m in range(L):
            if log_gate.shape[2] == 1 and m > n:
                continue
            between = gate[:, m + 1 : n + 1, 0] if m <= n else gate[:, n:m, 1]
            seen = documents[:, n].eq(documents[:, m]) & documents[:, n].ne(0)
            M[:, :, n, m] = (q[:, n] * k[:, m] * between.prod(1)).sum(-1) * seen[:, None]
    return M


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
