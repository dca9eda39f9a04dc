"""The selective scan in plain torch: the chunked form that runs, and the loop that defines it.

x_t = exp(delta_t A) x_t-1 + delta_t u_t B_t,  y_t = (C_t . x_t + D u_t) silu(z_t)        (Mamba, arXiv 2312.00752)

u, delta, z (batch, length, dim), A (dim, state), B, C (batch, length, state), D, delta_bias (dim,), segments (batch,
length) with 0 at padding; delta_t stands for softplus(delta_t + delta_bias). Each document starts from x = 0. A reverse
scan runs from right to left. Everything is computed in fp32, or in fp64 for fp64 inputs, and rounded once.

Time goes by in chunks of ``CHUNK`` steps: what does not depend on the state is computed for a whole chunk at once, with
dim innermost, so that one fused multiply-add per step remains. The state that enters each chunk is kept; the backward
computes the others anew from it, so that memory is O(length) plus one chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ultrazoo.ops.segments import checked, last_documents

CHUNK = 32
_NUMBERS_AT_ONCE = 1 << 15  # rows of the batch go together up to this many numbers of state, so that they stay in cache
_LINEAR_FROM = 40  # from here on softplus(x) is x, also in fp64
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    segments: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """y_t = (C_t . x_t + D u_t) silu(z_t), chunk by chunk.

    Returns:
        (batch, length, dim) y in the dtype of u, and the (batch, chunks, state, dim) states that enter the chunks of
        ``CHUNK`` positions, in the computing dtype; both contiguous.
    """
    scan = _Scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, segments, reverse)
    y = u.new_empty(u.shape, dtype=scan.dtype)
    states = u.new_zeros((u.shape[0], scan.chunks, A.shape[1], A.shape[0]), dtype=scan.dtype)
    with torch.autocast(u.device.type, enabled=False):
        for rows in scan.row_blocks():
            state: Tensor | None = None
            for chunk in scan.walk(rows):
                if state is not None:
                    states[rows, chunk.index] = state
                state = chunk.advance(states[rows, chunk.index])
                result = chunk.read_out()
                if chunk.z is not None:
                    result.mul_(F.silu(chunk.z))
                chunk.write(y, result)
    return y.to(u.dtype), states


def selective_scan_backward_reference(
    grad: Tensor,
    states: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    segments: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, ...]:
    """Gradients of u, delta, A, B, C, D, z and delta_bias, chunk by chunk against the scan.

    With h_t the gradient of x_t and a_t = exp(delta_t A): h_t = g_t C_t + a_t+1 h_t+1, where g_t is the gradient of
    C_t . x_t. The gradient of delta_t A is h_t a_t x_t-1, that of delta_t u_t is h_t . B_t.

    Returns:
        The eight gradients, contiguous, in the dtypes of their inputs; empty ones of shape (0,) for absent inputs.
    """
    scan = _Scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, segments, reverse)
    du, ddelta, dB, dC = (x.new_empty(x.shape, dtype=scan.dtype) for x in (u, delta, B, C))
    dz = u.new_empty(0 if z is None else z.shape, dtype=scan.dtype)
    dA = torch.zeros_like(scan.A)
    dD, dbias = (u.new_zeros(0 if x is None else x.shape, dtype=scan.dtype) for x in (D, delta_bias))
    with torch.autocast(u.device.type, enabled=False):
        for rows in scan.row_blocks():
            carry: Tensor | None = None  # a_t h_t at the first step of the chunk after this one
            for chunk in scan.walk(rows, backwards=True):
                state = states[rows, chunk.index]
                chunk.advance(state)
                g = chunk.read(grad)
                if chunk.z is not None:
                    gate = torch.sigmoid(chunk.z)
                    chunk.write(dz, g * chunk.read_out() * gate * (1 + chunk.z * (1 - gate)))
                    g = g * chunk.z * gate
                chunk.write(dC, torch.matmul(g.unsqueeze(2), chunk.x.mT).squeeze(2))
                h = chunk.buffer("h")
                torch.mul(chunk.C.unsqueeze(3), g.unsqueeze(2), out=h)
                if carry is not None:
                    h[:, -1].add_(carry)
                steps = list(zip(chunk.decay.unbind(1), h.unbind(1), strict=True))
                for (_, h_t), (later_decay, later_h) in zip(steps[-2::-1], steps[:0:-1], strict=True):
                    h_t.addcmul_(later_decay, later_h)
                carry = steps[0][0] * steps[0][1]
                d_input = torch.matmul(chunk.B.unsqueeze(2), h).squeeze(2)
                chunk.write(dB, torch.matmul(chunk.input.unsqueeze(2), h.mT).squeeze(2))
                d_exponent = chunk.decay.mul_(h)
                d_exponent[:, 1:].mul_(chunk.x[:, :-1])
                d_exponent[:, 0].mul_(state)
                dA += torch.mul(d_exponent, chunk.delta.unsqueeze(2), out=h).sum((0, 1))
                d_delta = torch.mul(d_exponent, scan.A, out=h).sum(2).addcmul_(d_input, chunk.u)
                if delta_softplus:
                    d_delta.mul_(-torch.expm1(-chunk.delta))  # sigmoid(x) = 1 - exp(-softplus(x))
                d_delta = chunk.only_real(d_delta)
                chunk.write(ddelta, d_delta)
                d_u = d_input * chunk.delta
                chunk.write(du, d_u if scan.D is None else d_u.addcmul_(g, scan.D))
                if D is not None:
                    dD += (g * chunk.u).sum((0, 1))
                if delta_bias is not None:
                    dbias += d_delta.sum((0, 1))
    gradients = (du, ddelta, dA.mT.contiguous(), dB, dC, dD, dz, dbias)
    inputs = (u, delta, A, B, C, A if D is None else D, u if z is None else z, A if delta_bias is None else delta_bias)
    return tuple(gradient.to(x.dtype) for gradient, x in zip(gradients, inputs, strict=True))


def selective_scan_loop(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    segments: Tensor | None = None,
    reverse: bool = False,
) -> Tensor:
    """y_t = (C_t . x_t + D u_t) silu(z_t), token by token: the definition; arguments as of ``selective_scan``."""
    wide = torch.promote_types(u.dtype, torch.float32)
    documents = torch.ones(u.shape[:2], dtype=torch.int64, device=u.device) if segments is None else checked(segments)
    real = documents.ne(0).unsqueeze(2)
    dtype, u, delta, B, C = u.dtype, *(x.to(wide) for x in (u, delta, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias
    delta = torch.where(real, F.softplus(delta, threshold=_LINEAR_FROM) if delta_softplus else delta, 0)
    state = u.new_zeros(u.shape[0], *A.shape)  # (batch, dim, state)
    y: list[Tensor] = []
    previous: Tensor | None = None
    steps = list(zip(*(x.unbind(1) for x in (delta, delta * u, B, C, documents)), strict=True))
    for delta_t, input_t, B_t, C_t, document in reversed(steps) if reverse else steps:
        if segments is not None and previous is not None:
            state = state * (document.eq(previous) | document.eq(0))[:, None, None]
        state = torch.exp(delta_t[:, :, None] * A) * state + input_t[:, :, None] * B_t[:, None, :]
        y.append((state @ C_t[:, :, None]).squeeze(2))
        previous = document if previous is None else torch.where(document.ne(0), document, previous)
    result = torch.stack(y[::-1] if reverse else y, dim=1) if y else torch.zeros_like(u)
    if D is not None:
        result = result + D * u
    if z is not None:
        result = result * F.silu(z.to(wide))
    return torch.where(real, result, 0).to(dtype)


class _Scan:
    """The arguments of a scan, and buffers that serve chunk after chunk."""

    def __init__(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        delta_softplus: bool,
        segments: Tensor | None,
        reverse: bool,
    ) -> None:
        self.dtype = torch.promote_types(u.dtype, torch.float32)
        self.u, self.delta, self.B, self.C, self.z = u, delta, B, C, z
        self.delta_softplus, self.segments, self.reverse = delta_softplus, segments, reverse
        self.before: Tensor | None = None  # the document of the last real token before each in the scan's order
        if segments is not None:
            self.segments, self.before = checked(segments), last_documents(segments, reverse)
        self.A = A.mT.to(self.dtype).contiguous()  # (state, dim)
        self.A_log2 = self.A / math.log(2)  # exp2 is several times faster than exp on a CPU
        self.D = None if D is None else D.to(self.dtype)
        self.delta_bias = None if delta_bias is None else delta_bias.to(self.dtype)
        self.chunks = -(-u.shape[1] // CHUNK)
        self._rows_at_once = max(1, min(u.shape[0], _NUMBERS_AT_ONCE // max(1, self.A.numel())))
        self._buffers: dict[str, Tensor] = {}

    def row_blocks(self) -> Iterator[slice]:
        """Yield parts of the batch, small enough for the cache."""
        for row in range(0, self.u.shape[0], self._rows_at_once):
            yield slice(row, min(row + self._rows_at_once, self.u.shape[0]))

    def walk(self, rows: slice, backwards: bool = False) -> Iterator[_Chunk]:
        """Yield the chunks of some rows in the order of the scan, or against it."""
        for index in sorted(range(self.chunks), reverse=self.reverse != backwards):
            yield _Chunk(self, rows, index)

    def buffer(self, name: str) -> Tensor:
        """(rows, CHUNK, state, dim) of memory, the same for the same name."""
        if name not in self._buffers:
            self._buffers[name] = self.A.new_empty(self._rows_at_once, CHUNK, *self.A.shape)
        return self._buffers[name]


class _Chunk:
    """Some rows of up to ``CHUNK`` positions, in the order of the scan; (rows, steps, ...)."""

    def __init__(self, scan: _Scan, rows: slice, index: int) -> None:
        self._scan, self._rows, self.index = scan, rows, index
        self._span = slice(index * CHUNK, min((index + 1) * CHUNK, scan.u.shape[1]))
        self._real: Tensor | None = None
        self._reset: Tensor | None = None
        if scan.segments is not None and scan.before is not None:
            self._mark(scan.segments, scan.before)
        self.u, self.B, self.C = self.read(scan.u), self.read(scan.B), self.read(scan.C)
        self.z = None if scan.z is None else self.read(scan.z)
        self.delta = self.read(scan.delta)
        if scan.delta_bias is not None:
            self.delta = self.delta + scan.delta_bias
        if scan.delta_softplus:
            self.delta = F.softplus(self.delta, threshold=_LINEAR_FROM)
        self.delta = self.only_real(self.delta)
        self.input = self.delta * self.u
        self.decay, self.x = self.buffer("decay"), self.buffer("x")

    def _mark(self, segments: Tensor, before: Tensor) -> None:
        """Find padding, over which the state passes unchanged, and the steps that do not see the state before them."""
        here, last = (self._ordered(x[self._rows, self._span]) for x in (segments, before))
        new = here.ne(0) & here.ne(last)
        self._reset = torch.zeros_like(new, dtype=self._scan.dtype).masked_fill_(new, -torch.inf)[:, :, None, None]
        self._real = here.ne(0).unsqueeze(2).to(_BITS[self._scan.dtype]).neg()  # all bits, or none at padding

    def read(self, x: Tensor) -> Tensor:
        """These positions of x (batch, length, n), in the computing dtype, 0 at padding."""
        return self.only_real(self._ordered(x[self._rows, self._span]).to(self._scan.dtype))

    def write(self, x: Tensor, part: Tensor) -> None:
        """Put part into these positions of x."""
        x[self._rows, self._span] = self._ordered(part)

    def buffer(self, name: str) -> Tensor:
        """(rows, steps, state, dim) of memory."""
        return self._scan.buffer(name)[: self.u.shape[0], : self.u.shape[1]]

    def advance(self, state: Tensor) -> Tensor:
        """Compute ``decay`` and the states ``x`` from the state before the first step; return the last state."""
        delta, scan = self.delta.unsqueeze(2), self._scan
        if self._reset is None:
            torch.mul(delta, scan.A_log2, out=self.decay)
        else:
            torch.addcmul(self._reset, delta, scan.A_log2, out=self.decay)
        self.decay.exp2_()
        torch.mul(self.input.unsqueeze(2), self.B.unsqueeze(3), out=self.x)
        for decay_t, x_t in zip(self.decay.unbind(1), self.x.unbind(1), strict=True):
            state = x_t.addcmul_(decay_t, state)
        return state

    def read_out(self) -> Tensor:
        """C_t . x_t + D u_t."""
        y = torch.matmul(self.C.unsqueeze(2), self.x).squeeze(2)
        return y if self._scan.D is None else y.addcmul_(self.u, self._scan.D)

    def _ordered(self, x: Tensor) -> Tensor:
        return x.flip(1) if self._scan.reverse else x

    def only_real(self, x: Tensor) -> Tensor:
        """x (rows, steps, n) with 0 at padding."""
        if self._real is None:
            return x
        return x.view(self._real.dtype).bitwise_and(self._real).view(x.dtype)  # masked_fill, NaN included, but fast
