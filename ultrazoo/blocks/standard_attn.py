"""Softmax attention (Vaswani et al. 2017, arXiv 1706.03762) as in BERT (arXiv 1810.04805)."""

from __future__ import annotations

from torch import Tensor, nn

from ultrazoo.nn.attention import AttentionConfig, AttentionProjections
from ultrazoo.nn.segments import mask_padding
from ultrazoo.ops import attention
from ultrazoo.spec import BlockSpec


class StandardAttnConfig(AttentionConfig):
    """Options of standard_attn."""


class StandardAttention(nn.Module):
    """o = softmax(q k^T / sqrt K) v by head, over the tokens of the query's own document (arXiv 1706.03762).

    Parameters: 4 D^2, and 4 D with biases.

    Args:
        config: Options.
    """

    def __init__(self, config: StandardAttnConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.projections = AttentionProjections(config, rotary=config.position_embedding == "rope")

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: (B, L, D).
            segments: (B, L) int64, or None.

        Returns:
            (B, L, D), zero at padding.
        """
        q, k, v = self.projections.split(x, segments)
        dropout = self.dropout if self.training else 0.0
        o = attention(q, k, v, segments=segments, dropout=dropout)
        return mask_padding(self.projections.merge(o), segments)


SPEC = BlockSpec(
    name="standard_attn",
    kind="mixer",
    module=StandardAttention,
    config=StandardAttnConfig,
    paper="arXiv 1706.03762",
    equation="o = softmax(q k^T / sqrt K) v",
    ops=("ultrazoo::attention",),
    bidirectional=True,
)
