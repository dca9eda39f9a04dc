"""Sigmoid attention (Ramapuram et al. 2024, arXiv 2409.04431)."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from ultrazoo.nn.attention import AttentionConfig, AttentionProjections, attention_mask
from ultrazoo.nn.dropout import drop
from ultrazoo.nn.norms import NormConfig, RMSNorm
from ultrazoo.nn.segments import mask_padding
from ultrazoo.ops import attention
from ultrazoo.spec import BlockSpec


class SigmoidAttnConfig(AttentionConfig):
    """Options of sigmoid_attn."""

    norm_eps: float = Field(default=1e-5, gt=0, description="Epsilon of the output norm and of qk_norm.")
    output_norm: bool = Field(
        default=True, description="RMSNorm of the block's output: the paper's hybrid norm, x + norm(attn(norm(x)))."
    )
    qk_norm: bool = Field(default=False, description="RMSNorm of queries and keys, by head, before positions.")
    layer_scale: float | None = Field(
        default=None,
        gt=0,
        description="Start of a learned gain per output channel, in the paper 1e-4; None: no gain.",
    )
    normalize: bool = Field(
        default=False, description="Divide each query's weights by their sum, which the paper does not do."
    )


class SigmoidAttention(nn.Module):
    """o = sigmoid(q k^T / sqrt K - log n) v by head, n the tokens of the query's own document (arXiv 2409.04431).

    Weights are not normalised over keys; -log n makes them sum to about 1 at the start whatever the length. As a query
    that fits nothing sums to almost 0 and one that fits all to n, the output's size is not bounded as softmax's is:
    hence the paper's stabilisers, of which the norm of the output is on unless switched off.
    Parameters: 4 D^2; 4 D with biases; D each for output_norm and layer_scale; 2 K for qk_norm.

    Args:
        config: Options.
    """

    def __init__(self, config: SigmoidAttnConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.normalize = config.normalize
        width, eps = config.hidden_size, config.norm_eps
        norms = None
        if config.qk_norm:
            head = NormConfig(hidden_size=config.head_width, norm_eps=eps)
            norms = (RMSNorm(head), RMSNorm(head))
        self.projections = AttentionProjections(config, rotary=config.position_embedding == "rope", qk_norms=norms)
        self.norm = RMSNorm(NormConfig(hidden_size=width, norm_eps=eps)) if config.output_norm else nn.Identity()
        scale = config.layer_scale
        self.gain = None if scale is None else nn.Parameter(torch.full((width,), scale))

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: (B, L, D).
            segments: (B, L) int64, or None.

        Returns:
            (B, L, D), zero at padding.
        """
        q, k, v = self.projections.split(x, segments)
        y = self.norm(self.projections.merge(self._attend(q, k, v, segments)))
        if self.gain is not None:
            y = y * self.gain.to(y.dtype)
        return mask_padding(y, segments)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None) -> Tensor:
        """Weigh the values: (B, L, H, K)."""
        if not self.normalize:
            dropout = self.dropout if self.training else 0.0
            return attention(q, k, v, segments=segments, dropout=dropout, kind="sigmoid")
        # in place from here to the sigmoid: autograd keeps it once
        mask = attention_mask(segments)
        scores = torch.einsum("bnhk,bmhk->bhnm", q * q.shape[-1] ** -0.5, k)
        if mask is None:
            scores.sub_(math.log(k.shape[1]))
        else:
            wide = torch.promote_types(scores.dtype, torch.float32)
            scores.sub_(mask.sum(-1, keepdim=True).to(wide).log()).masked_fill_(~mask, -torch.inf)
        weights = scores.sigmoid_()
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
        return torch.einsum("bhnm,bmhv->bnhv", drop(weights, self.dropout, self.training), v)


SPEC = BlockSpec(
    name="sigmoid_attn",
    kind="mixer",
    module=SigmoidAttention,
    config=SigmoidAttnConfig,
    paper="arXiv 2409.04431",
    equation="o = sigmoid(q k^T / sqrt K - log n) v",
    ops=("ultrazoo::attention",),
    bidirectional=True,
)
