"""EmbBERT's layer: attention minus convolution, and nothing around them."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ultrazoo.nn.block_config import BlockConfig
from ultrazoo.nn.conv import SegmentConv1d
from ultrazoo.nn.saturate import saturate
from ultrazoo.nn.segments import mask_padding
from ultrazoo.ops import attention
from ultrazoo.spec import BlockSpec


class EmbBERTConfig(BlockConfig):
    """Options of ``embbert``."""

    hidden_size: int = Field(gt=0, description="Model width D.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Probability of dropping an attention weight.")
    kernel: int = Field(default=32, gt=0, description="Taps W of the convolution: a token and the W - 1 before it.")
    expand: int = Field(default=1, gt=0, description="Channels of the convolution as a multiple of hidden_size.")


class EmbBERT(nn.Module):
    """y = l1 (P x W_o + b_o) - l2 (SiLU(conv(x)) W_c + b_c), P = softmax((x W_q + b_q) x^T / sqrt D), 2502.10001.

    One head, whose keys and values are the tokens themselves. The convolution is depthwise and causal. l = exp(p . q)
    with two learned vectors for each branch, from N(0, 0.1^2); the linear layers start as torch's do. The output is the
    layer's: no residual, no feed-forward. Parameters: 3 (D^2 + D) + D (W + 1) + 4 D, at ``expand`` 1.

    Args:
        config: Width and options.
    """

    def __init__(self, config: EmbBERTConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.expand * config.hidden_size
        self.dropout = config.dropout
        self.query = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.conv = SegmentConv1d(width, inner, config.kernel, groups=width, side="left")
        self.contract = nn.Linear(inner, width)
        self.attention_scale = nn.Parameter(0.1 * torch.randn(2, width))
        self.conv_scale = nn.Parameter(0.1 * torch.randn(2, width))
        for parameter in (self.attention_scale, self.conv_scale):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        """Mix the tokens of each document.

        Args:
            x: (B, L, D), finite at padding.
            segments: (B, L) int64, or None.

        Returns:
            (B, L, D), zero at padding.
        """
        q = saturate(self.query(x)).unsqueeze(2)  # (B, L, 1, D)
        kv = x.to(q.dtype).unsqueeze(2)
        dropout = self.dropout if self.training else 0.0
        context = attention(q, kv, kv, segments=segments, dropout=dropout).squeeze(2)
        attended = saturate(self.output(context))
        convolved = saturate(self.contract(F.silu(saturate(self.conv(x, segments)))))
        wide = torch.promote_types(attended.dtype, torch.float32)
        y = _scale(self.attention_scale, wide) * attended.to(wide) - _scale(self.conv_scale, wide) * convolved.to(wide)
        return mask_padding(saturate(y.to(attended.dtype)), segments)

    def statistics(self) -> dict[str, Tensor]:
        """The two learned factors, l1 and l2."""
        factors = {"attention": self.attention_scale, "convolution": self.conv_scale}
        return {name: _scale(pair.detach(), torch.float32) for name, pair in factors.items()}


def _scale(pair: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(p . q) of a (2, D) pair, as a scalar."""
    return pair.to(dtype).prod(0).sum().exp()


SPEC = BlockSpec(
    name="embbert",
    kind="mixer",
    module=EmbBERT,
    config=EmbBERTConfig,
    paper="arXiv 2502.10001",
    equation="y = l1 softmax((x W_q) x^T / sqrt D) x W_o - l2 SiLU(conv(x)) W_c, in place of x",
    ops=("ultrazoo::attention",),
    bidirectional=True,
    residual=False,
)
