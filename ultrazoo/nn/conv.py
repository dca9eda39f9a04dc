"""Convolution along the row that never reads across a document's border, nor from padding, which it passes over."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultrazoo.nn.segments import Gaps, mask_padding

Side = Literal["left", "right", "both"]


class SegmentConv1d(nn.Module):
    """y_t = bias + sum_j weight_j x_{t - reach + j} over the positions of t's own document; zero at padding.

    ``weight`` (channels_out, channels_in / groups, kernel_size) and its initial values are those of ``nn.Conv1d``.

    Args:
        channels_in: channels of the input.
        channels_out: channels of the output.
        kernel_size: W, the taps.
        groups: 1 is dense; ``channels_in`` with as many ``channels_out`` is depthwise.
        side: what a token reads: ``left`` itself and the W - 1 tokens before it (causal), ``right`` itself and the
            W - 1 after it, ``both`` (W - 1) // 2 before and W // 2 after.
        bias: whether a learned bias is added.

    Raises:
        ValueError: the kernel is empty, or the groups do not divide the channels.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel_size: int,
        groups: int = 1,
        side: Side = "both",
        bias: bool = True,
    ) -> None:
        super().__init__()
        if kernel_size < 1:
            raise ValueError(f"SegmentConv1d: got kernel_size {kernel_size}, expected at least 1")
        if groups < 1 or channels_in % groups or channels_out % groups:
            raise ValueError(
                f"SegmentConv1d: got {groups} groups for {channels_in} -> {channels_out} channels, expected a divisor "
                "of both; use 1 for a dense convolution"
            )
        self.groups = groups
        self.side = side
        self.reach = {"left": kernel_size - 1, "right": 0, "both": (kernel_size - 1) // 2}[side]
        self.weight = nn.Parameter(torch.empty(channels_out, channels_in // groups, kernel_size))
        self.bias = nn.Parameter(torch.empty(channels_out)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias from U(-b, b) with b = (channels_in / groups * kernel_size)^-0.5, as ``nn.Conv1d``."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = (self.weight.shape[1] * self.weight.shape[2]) ** -0.5
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        """Convolve each document separately; padding inside a document is passed over.

        Args:
            x: (B, L, channels_in), finite at padding.
            segments: (B, L) int64, or None.

        Returns:
            (B, L, channels_out), zero at padding.
        """
        gaps = Gaps.of(segments)
        x, segments = gaps.close(x), gaps.segments
        channels_out, per_group, _ = self.weight.shape
        if per_group == 1 and channels_out == self.groups:
            y: Tensor = _Depthwise.apply(x, self.weight.squeeze(1), self.bias, segments, self.reach)
        elif segments is None:
            y = self._dense_full(x)
        else:
            y = self._dense_taps(x, segments)
        return gaps.open(mask_padding(y, segments))

    def _dense_full(self, x: Tensor) -> Tensor:
        before, after = self.reach, self.weight.shape[2] - 1 - self.reach
        channels_first = F.pad(x.transpose(1, 2), (before, after))  # (B, channels_in, L + W - 1)
        return F.conv1d(channels_first, self.weight, self.bias, groups=self.groups).transpose(1, 2)

    def _dense_taps(self, x: Tensor, segments: Tensor) -> Tensor:
        grouped = x.unflatten(2, (self.groups, -1))  # (B, L, G, channels_in / G)
        weight = self.weight.unflatten(0, (self.groups, -1))  # (G, channels_out / G, channels_in / G, W)
        projected = torch.einsum("blgi,goi->blgo", grouped, weight[..., self.reach]).flatten(2)
        y = projected.to(torch.promote_types(projected.dtype, torch.float32))
        for tap in range(weight.shape[3]):
            here, there = _windows(x.shape[1], tap - self.reach)
            if tap == self.reach or here.start >= here.stop:
                continue
            read = torch.einsum("blgi,goi->blgo", grouped, weight[..., tap]).flatten(2)[:, there]
            read = read.masked_fill(segments[:, here].ne(segments[:, there]).unsqueeze(2), 0)
            y = y + F.pad(read, (0, 0, here.start, x.shape[1] - here.stop))
        if self.bias is not None:
            y = y + self.bias
        return y.to(projected.dtype)

    def extra_repr(self) -> str:
        """Describe the convolution in a module's printout."""
        channels_out, per_group, taps = self.weight.shape
        return (
            f"{per_group * self.groups}, {channels_out}, kernel_size={taps}, groups={self.groups}, side={self.side!r}"
        )


def _windows(length: int, offset: int) -> tuple[slice, slice]:
    """Return the positions that have a neighbour at ``offset``, and those neighbours."""
    here = slice(max(0, -offset), max(0, length - max(0, offset)))
    return here, slice(here.start + offset, max(here.start + offset, here.stop + offset))


class _Depthwise(torch.autograd.Function):
    """Depthwise taps summed in place, in fp32; saves its inputs and nothing a tap long."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        segments: Tensor | None,
        reach: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, segments)  # type: ignore[arg-type]
        ctx.reach, ctx.has_bias = reach, bias is not None  # type: ignore[attr-defined]
        dtype = torch.promote_types(x.dtype, torch.float32)
        y = torch.zeros_like(x, dtype=dtype) if bias is None else bias.to(dtype).expand(x.shape).clone()
        for tap, column in enumerate(weight.to(dtype).unbind(1)):
            here, there = _windows(x.shape[1], tap - reach)
            if here.start >= here.stop:
                continue
            read = x[:, there].to(dtype)
            if segments is not None and tap != reach:
                read = read.masked_fill(segments[:, here].ne(segments[:, there]).unsqueeze(2), 0)
            y[:, here].addcmul_(read, column)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, segments = ctx.saved_tensors  # type: ignore[attr-defined]
        dtype = torch.promote_types(x.dtype, torch.float32)
        x_full, grad_full = x.to(dtype), grad.to(dtype)
        grad_x = torch.zeros_like(x_full)
        grad_weight = []
        for tap, column in enumerate(weight.to(dtype).unbind(1)):
            here, there = _windows(x.shape[1], tap - ctx.reach)  # type: ignore[attr-defined]
            if here.start >= here.stop:
                grad_weight.append(torch.zeros_like(column))
                continue
            sent = grad_full[:, here]
            if segments is not None and tap != ctx.reach:  # type: ignore[attr-defined]
                sent = sent.masked_fill(segments[:, here].ne(segments[:, there]).unsqueeze(2), 0)
            grad_x[:, there].addcmul_(sent, column)
            grad_weight.append((sent * x_full[:, there]).sum((0, 1)))
        grad_bias = grad_full.sum((0, 1)).to(weight.dtype) if ctx.has_bias else None  # type: ignore[attr-defined]
        return grad_x.to(x.dtype), torch.stack(grad_weight, 1).to(weight.dtype), grad_bias, None, None
