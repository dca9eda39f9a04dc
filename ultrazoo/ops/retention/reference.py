"""Retention in plain torch: the chunkwise form that runs, and the two forms that define it.

o_n = sum_m exp(log_decay |n - m|) (q_n . k_m) v_m, over m <= n when causal and over every m otherwise (the diagonal
once), with m and n in one document. q, k (B, L, H, K), v (B, L, H, V), log_decay (H,), segments (B, L) with 0 at
padding. Everything is computed in fp32, or in fp64 for fp64 inputs, and rounded once.

Chunkwise, C tokens at a time: pairs within a chunk go through their (C, C) scores; what lies before the chunk (in a
second sweep: after it) is summed up in one (K, V) state per head. At a border between documents the state is dropped
and every weight across it is zero, so padding and packing are exact; gaps are closed first. Work is linear in L; the
backward computes scores and states anew, so memory is O(L).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ultrazoo.ops.segments import Gaps, checked

DEFAULT_CHUNK = 64
_HEADS_AT_ONCE = 48  # rows of the batch go together up to this many heads, so that a chunk stays in cache
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def retention_reference(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, segments: Tensor | None, causal: bool, chunk_size: int | None
) -> Tensor:
    """o_n = sum_m exp(log_decay |n - m|) (q_n . k_m) v_m, chunk by chunk.

    Returns:
        (B, L, H, V), contiguous, in the dtype of q.
    """
    gaps = Gaps.of(segments)
    q, k, v, segments = gaps.close(q), gaps.close(k), gaps.close(v), gaps.segments
    o = v.new_empty(v.shape, dtype=_wide(q))
    with torch.autocast(q.device.type, enabled=False):
        for rows in _row_blocks(q):
            walk = _Walk(q[rows], log_decay, None if segments is None else segments[rows], causal, chunk_size)
            for leftwards in walk.directions(both=not causal):
                state: Tensor | None = None
                for chunk in walk.sweep(leftwards):
                    qc, kc, vc = chunk.read("q", q[rows]), chunk.read("k", k[rows]), chunk.read("v", v[rows])
                    oc = chunk.buffer("o", v.shape[3])
                    if leftwards:
                        oc.zero_()
                    else:
                        torch.bmm(chunk.scores("qk", qc, kc), vc, out=oc)
                    if state is not None:
                        oc.baddbmm_(chunk.entering(qc), state)
                    chunk.write(o[rows], oc, add=leftwards)
                    state = chunk.pass_on(state, kc, vc)
    return gaps.open(o.to(q.dtype))


def retention_backward_reference(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    segments: Tensor | None,
    causal: bool,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, chunk by chunk; log_decay is a constant.

    With p_nm = (grad_n . v_m) and s_nm = (q_n . k_m), both times the decay: dq_n = sum_m p_nm k_m,
    dk_m = sum_n p_nm q_n and dv_m = sum_n s_nm grad_n. Beyond the chunk, dq reads the sum of k v^T over the keys,
    dk and dv that of q grad^T over the queries.
    """
    gaps = Gaps.of(segments)
    grad, q, k, v, segments = gaps.close(grad), gaps.close(q), gaps.close(k), gaps.close(v), gaps.segments
    dq, dk, dv = (x.new_empty(x.shape, dtype=_wide(q)) for x in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        for rows in _row_blocks(q):
            walk = _Walk(q[rows], log_decay, None if segments is None else segments[rows], causal, chunk_size)
            for leftwards in walk.directions(both=True):
                keys: Tensor | None = None
                queries: Tensor | None = None
                for chunk in walk.sweep(leftwards):
                    qc, kc = chunk.read("q", q[rows]), chunk.read("k", k[rows])
                    vc, gc = chunk.read("v", v[rows]), chunk.read("g", grad[rows])
                    parts = [chunk.buffer("d" + name, x.shape[3]) for name, x in (("q", q), ("k", k), ("v", v))]
                    dqc, dkc, dvc = parts
                    if leftwards:
                        for part in parts:
                            part.zero_()
                    else:
                        s, p = chunk.scores("qk", qc, kc), chunk.scores("gv", gc, vc)
                        torch.bmm(p, kc, out=dqc)
                        torch.bmm(p.mT, qc, out=dkc)
                        torch.bmm(s.mT, gc, out=dvc)
                    if keys is not None:
                        dqc.baddbmm_(chunk.entering(gc), keys.mT)
                    if queries is not None:
                        dkc.baddbmm_(chunk.entering(vc), queries.mT)
                        dvc.baddbmm_(chunk.entering(kc), queries)
                    for gradient, part in zip((dq, dk, dv), parts, strict=True):
                        chunk.write(gradient[rows], part, add=leftwards)
                    if not (causal and leftwards):
                        keys = chunk.pass_on(keys, kc, vc)
                    if not causal or leftwards:
                        queries = chunk.pass_on(queries, qc, gc)
    return gaps.open(dq.to(q.dtype)), gaps.open(dk.to(k.dtype)), gaps.open(dv.to(v.dtype))


class _Walk:
    """The chunks of some rows: powers of the decay, and buffers that serve chunk after chunk."""

    def __init__(
        self, q: Tensor, log_decay: Tensor, segments: Tensor | None, causal: bool, chunk_size: int | None
    ) -> None:
        self.batch, self.length, self.heads, _ = q.shape
        self.size = max(1, min(chunk_size or DEFAULT_CHUNK, self.length))
        self.segments = segments
        self.like = q.new_empty(0, dtype=_wide(q))
        step = log_decay.to(self.like.dtype)[:, None]
        index = torch.arange(self.size + 1, device=q.device, dtype=self.like.dtype)
        self.powers = torch.exp(step * index)  # (H, C + 1): decay over 0 to C steps
        self.within = torch.exp(step[:, None] * (index[:-1, None] - index[:-1]).abs())  # (H, C, C)
        if causal:
            self.within.tril_()
        self._buffers: dict[tuple[str, int, int], Tensor] = {}

    def directions(self, both: bool) -> tuple[bool, ...]:
        """Which sweeps there are, as ``leftwards``: nothing is to be carried leftwards over a single chunk."""
        return (False, True) if both and self.size < self.length else (False,)

    def sweep(self, leftwards: bool) -> Iterator[_Chunk]:
        """Yield the chunks in order; the last one is short, and nothing leaves it rightwards or enters it leftwards."""
        enter, leave = self.powers[:, 1:], self.powers[:, :-1].flip(1)
        if leftwards:
            enter, leave = enter.flip(1), leave.flip(1)
        for start in sorted(range(0, self.length, self.size), reverse=leftwards):
            stop = min(start + self.size, self.length)
            yield _Chunk(self, start, stop, leftwards, enter[:, : stop - start], leave[:, : stop - start])

    def buffer(self, name: str, rows: int, columns: int) -> Tensor:
        """(B * H, rows, columns) of memory, the same for the same arguments."""
        key = (name, rows, columns)
        if key not in self._buffers:
            self._buffers[key] = self.like.new_empty(self.batch * self.heads, rows, columns)
        return self._buffers[key]


class _Chunk:
    """Positions start to stop - 1, n of them, in a sweep; its tensors are (B * H, n, ...)."""

    def __init__(self, walk: _Walk, start: int, stop: int, leftwards: bool, enter: Tensor, leave: Tensor) -> None:
        self.walk, self.start, self.stop = walk, start, stop
        self.last = start == 0 if leftwards else stop == walk.length
        first = stop == walk.length if leftwards else start == 0
        carry = walk.powers[:, -1, None, None]  # (H, 1, 1)
        self.enter, self.leave, self.carry = enter[..., None], leave[..., None], carry  # (H, n, 1)
        self.real: Tensor | None = None
        self.same: Tensor | None = None
        if walk.segments is not None:
            here = walk.segments[:, start:stop]
            exit_ = here[:, :1] if leftwards else here[:, -1:]
            self.real = here.ne(0)[:, None, :, None].to(_BITS[walk.like.dtype]).neg()  # all bits, or none at padding
            self.same = here[:, None, :, None].eq(here[:, None, None, :]).to(walk.like.dtype)
            self.leave = self.leave * here.eq(exit_)[:, None, :, None]
            if not first:
                entry = walk.segments[:, stop, None] if leftwards else walk.segments[:, start - 1, None]
                self.enter = self.enter * here.eq(entry)[:, None, :, None]
                self.carry = carry * entry.eq(exit_)[:, None, :, None]

    def buffer(self, name: str, columns: int) -> Tensor:
        return self.walk.buffer(name, self.stop - self.start, columns)

    def read(self, name: str, x: Tensor) -> Tensor:
        """Positions of x (B, L, H, K), in the computing dtype, 0 at padding."""
        part = self.buffer(name, x.shape[3])
        by_head = self._by_head(part).copy_(x[:, self.start : self.stop].transpose(1, 2))
        if self.real is not None:
            by_head.view(self.real.dtype).bitwise_and_(self.real)  # as masked_fill_, and NaN goes too, 7 times faster
        return part

    def write(self, x: Tensor, part: Tensor, add: bool) -> None:
        """Put part into x (B, L, H, V), or add it."""
        place = x[:, self.start : self.stop].transpose(1, 2)
        if add:
            place.add_(self._by_head(part))
        else:
            place.copy_(self._by_head(part))

    def scores(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        """(left . right) times the decay for each pair of positions in one document: (B * H, n, n)."""
        n = self.stop - self.start
        pairs = torch.bmm(left, right.mT, out=self.buffer(name, n))
        by_head = self._by_head(pairs).mul_(self.walk.within[:, :n, :n])
        if self.same is not None:
            by_head.mul_(self.same)
        return pairs

    def entering(self, x: Tensor) -> Tensor:
        """x times the decay between the state that enters and each position."""
        return self._scaled(x, self.enter)

    def pass_on(self, state: Tensor | None, keys: Tensor, values: Tensor) -> Tensor | None:
        """The state (B * H, K, V) after this chunk: carry * state + sum_j leave_j keys_j values_j^T."""
        if self.last:
            return None
        decayed = self._scaled(keys, self.leave).mT
        if state is None:
            return torch.bmm(decayed, values)
        self._by_head(state).mul_(self.carry)
        return state.baddbmm_(decayed, values)

    def _scaled(self, x: Tensor, weight: Tensor) -> Tensor:
        scaled = self.buffer("scaled", x.shape[2])
        torch.mul(self._by_head(x), weight, out=self._by_head(scaled))
        return scaled

    def _by_head(self, x: Tensor) -> Tensor:
        return x.view(self.walk.batch, self.walk.heads, *x.shape[1:])


def retention_parallel(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, segments: Tensor | None = None, causal: bool = False
) -> Tensor:
    """o = ((q k^T) * decay) v with the whole (L, L) matrix of scores: the definition, quadratic in L."""
    wide = _wide(q)
    real = q.new_ones(q.shape[:2], dtype=torch.bool) if segments is None else checked(segments).ne(0)
    index = real.cumsum(1)  # padding takes no time
    offset = (index[:, :, None] - index[:, None])[:, None]  # (B, 1, L, L)
    decay = torch.exp(log_decay.to(wide)[:, None, None] * offset.abs())
    if causal:
        decay = decay.tril()
    scores = torch.einsum("bnhk,bmhk->bhnm", q.to(wide), k.to(wide)) * decay
    if segments is not None:
        same = segments[:, :, None].eq(segments[:, None]) & segments.ne(0)[:, None]
        scores = scores * same[:, None]
    return torch.einsum("bhnm,bmhv->bnhv", scores, v.to(wide)).to(q.dtype)


def retention_recurrent(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, segments: Tensor | None = None, causal: bool = False
) -> Tensor:
    """o_n = q_n S_n (+ decay q_n Z_n+1), S and Z the decayed sums of k v^T up to and from n: token by token."""
    wide = _wide(q)
    decay = log_decay.to(wide).exp()[:, None, None]
    documents = torch.ones(q.shape[:2], dtype=torch.int64, device=q.device) if segments is None else checked(segments)
    o = v.new_zeros(v.shape, dtype=wide)
    for leftwards in (False,) if causal else (False, True):
        state = v.new_zeros((q.shape[0], *q.shape[2:], v.shape[3]), dtype=wide)
        previous = documents.new_zeros(q.shape[0])
        for n in sorted(range(q.shape[1]), reverse=leftwards):
            document = documents[:, n]
            here = document.ne(0)[:, None, None, None]  # padding takes no time
            state = torch.where(here, state * decay * document.eq(previous)[:, None, None, None], state)
            own = torch.einsum("bhk,bhv->bhkv", k[:, n].to(wide), v[:, n].to(wide))
            own = own * here
            seen = state if leftwards else state + own
            o[:, n] += torch.einsum("bhk,bhkv->bhv", q[:, n].to(wide), seen * here)
            state = state + own
            previous = torch.where(document.ne(0), document, previous)
    return o.to(q.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _row_blocks(q: Tensor) -> Iterator[slice]:
    rows = max(1, _HEADS_AT_ONCE // max(1, q.shape[2]))
    return (slice(row, row + rows) for row in range(0, q.shape[0], rows))
