"""Titans, memory as gate (Behrouz et al. 2024, arXiv 2501.00663), with HoPE (arXiv 2509.05218) or rotary positions."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from ultrazoo.nn.attention import AttentionConfig, AttentionProjections, attention_mask
from ultrazoo.nn.hope import frequencies, hope_attention
from ultrazoo.nn.neural_memory import NeuralMemory
from ultrazoo.nn.norms import NormConfig, RMSNorm
from ultrazoo.nn.segments import Gaps, mask_padding
from ultrazoo.ops import attention
from ultrazoo.spec import BlockSpec

FIRST_GAIN = 0.1
"""Of the norm of the attention; with 1 a model under derf or dynamic_tanh learned token frequencies and no more."""


class TitanAttnConfig(AttentionConfig):
    """Options of titan_attn."""

    norm_eps: float = Field(default=1e-5, gt=0, description="Epsilon of the norms of the two branches.")
    use_hope: bool = Field(default=False, description="HoPE in the attention, in place of rotary positions.")
    hope_base: float = Field(default=10000.0, gt=1, description="Base of HoPE's frequencies.")
    hope_damping: float = Field(default=0.01, ge=0, description="Decay of HoPE per token.")
    memory_chunk_size: int = Field(
        default=32, ge=1, description="Tokens whose surprise is taken at one memory; 1 is the paper's recurrence."
    )
    memory_conv_kernel: int = Field(
        default=3, ge=1, description="Taps of the depthwise convolution of the memory's q, k, v."
    )
    persistent_tokens: int = Field(
        default=4, ge=0, description="Learned tokens that every query attends to: the paper's persistent memory."
    )

    @property
    def pairs_channels(self) -> bool:
        """HoPE acts on pairs of channels too."""
        return self.use_hope or super().pairs_channels


class TitanAttention(nn.Module):
    """o = (norm(attention([p || x])) * sigmoid(norm(memory(x)))) W_o: Titans' memory as gate (arXiv 2501.00663).

    Both branches read x. Attention is softmax attention over the query's document and over learned persistent tokens p,
    which have no position. The memory is the paper's, with a matrix per head (see ``ultrazoo.nn.neural_memory``), run
    forwards and backwards for an encoder; its initial state is learned, in the place of writing p first. Norms are RMS
    with a learned gain; that of the attention begins at 0.1, as a branch of unit size would outweigh the stream that it
    is added to, whose other branches begin at a few hundredths. At the start the memory is nearly empty and the gate
    about one half.
    Parameters: 4 D^2 for attention (4 D with biases) and P D for p; 2 D for the norms; for the memory 3 D^2 + 3 W D,
    6 H (D + 1) for its gates and 2 D^2 / H for its initial states.

    Args:
        config: Options.
    """

    def __init__(self, config: TitanAttnConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.dropout = config.dropout
        self.use_hope = config.use_hope
        self.hope_base = config.hope_base
        self.hope_damping = config.hope_damping
        rotary = config.position_embedding == "rope" and not config.use_hope
        self.projections = AttentionProjections(config, rotary=rotary)
        self.memory = NeuralMemory(
            width,
            config.num_heads,
            chunk_size=config.memory_chunk_size,
            conv_kernel=config.memory_conv_kernel,
            initializer_range=config.initializer_range,
            bitnet=config.use_bitnet,
        )
        norm = NormConfig(hidden_size=width, norm_eps=config.norm_eps)
        self.attention_norm, self.memory_norm = RMSNorm(norm), RMSNorm(norm)
        nn.init.constant_(self.attention_norm.weight, FIRST_GAIN)
        tokens = torch.randn(config.persistent_tokens, width) * config.initializer_range
        self.persistent = nn.Parameter(tokens) if config.persistent_tokens else None
        if self.persistent is not None:
            self.persistent._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        """Attend, remember, and gate one with the other.

        Args:
            x: (B, L, D), finite at padding.
            segments: (B, L) int64, or None.

        Returns:
            (B, L, D), zero at padding.
        """
        attended = self._attend(x, segments).flatten(2)  # (B, L, D)
        gate = torch.sigmoid(self.memory_norm(self.memory(x, segments)))
        y = self.projections.output(self.attention_norm(attended) * gate.to(attended.dtype))
        return mask_padding(y, segments)

    def _attend(self, x: Tensor, segments: Tensor | None) -> Tensor:
        """Attend to the document and the persistent tokens: (B, L, H, K)."""
        q, k, v = self.projections.split(x, segments)  # (B, L, H, K) each
        dropout = self.dropout if self.training else 0.0
        prefix = None if self.persistent is None else self._prefix(self.persistent.to(x.dtype))
        if self.use_hope:
            return self._attend_hope(q, k, v, segments, prefix, dropout)
        if prefix is None:
            return attention(q, k, v, segments=segments, dropout=dropout)
        k, v = (
            torch.cat((free.expand(x.shape[0], -1, -1, -1), part), dim=1)
            for free, part in zip(prefix, (k, v), strict=True)
        )
        return attention(q, k, v, segments=segments, dropout=dropout, prefix=prefix[0].shape[1])

    def _attend_hope(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segments: Tensor | None,
        prefix: tuple[Tensor, Tensor] | None,
        dropout: float,
    ) -> Tensor:
        theta = frequencies(
            q.shape[-1], self.hope_base, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device
        )
        gaps = Gaps.of(segments)  # positions are places in the row here
        q, k, v = (gaps.close(part).transpose(1, 2) for part in (q, k, v))
        if prefix is not None:
            prefix = (prefix[0].transpose(1, 2), prefix[1].transpose(1, 2))
        mask = attention_mask(gaps.segments)
        o = hope_attention(q, k, v, theta, self.hope_damping, mask=mask, prefix=prefix, dropout=dropout)
        return gaps.open(o.transpose(1, 2))

    def _prefix(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (1, P, H, K) of the persistent tokens (P, D), unrotated."""
        qkv = self.projections.qkv(tokens).unflatten(1, (3, self.projections.num_heads, -1))
        _, k, v = qkv.unsqueeze(0).unbind(2)
        return k, v


SPEC = BlockSpec(
    name="titan_attn",
    kind="mixer",
    module=TitanAttention,
    config=TitanAttnConfig,
    paper="arXiv 2501.00663",
    equation="o = (norm(attention([p || x])) * sigmoid(norm(memory(x)))) W_o",
    ops=("ultrazoo::attention",),
    bidirectional=True,
)
