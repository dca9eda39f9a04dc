"""From token ids to vectors, and from vectors back to the vocabulary."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ultrazoo.errors import ConfigError
from ultrazoo.nn.block_config import BlockConfig
from ultrazoo.nn.conv import SegmentConv1d
from ultrazoo.nn.dropout import Dropout
from ultrazoo.nn.mlp import ACTIVATIONS, Activation
from ultrazoo.nn.segments import mask_padding, positions


class EmbeddingConfig(BlockConfig):
    """What embeddings and head take from the model section."""

    vocab_size: int = Field(gt=0, description="Entries V of the vocabulary.")
    hidden_size: int = Field(gt=0, description="Model width D.")
    use_factorized_embedding: bool = Field(default=False, description="Token vectors of a narrow width E, projected.")
    factorized_embedding_dim: int = Field(default=128, gt=0, description="That width E.")
    use_embedding_conv: bool = Field(default=False, description="Convolve the narrow token vectors along the row.")
    embedding_conv_kernel: int = Field(default=3, gt=0, description="Taps W of that convolution.")
    position_embedding: Literal["none", "learned", "sinusoidal", "rope"] = Field(
        default="none", description="none and rope add nothing here."
    )
    max_position_embeddings: int = Field(default=512, gt=0, description="Rows of the learned table.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="After the norm.")
    initializer_range: float = Field(default=0.02, gt=0, description="Standard deviation of initial weights.")
    tie_word_embeddings: bool = Field(default=True, description="The head reads out through the token table.")
    ffn_activation: Activation = Field(default="gelu", description="Activation of the head.")

    @property
    def width(self) -> int:
        """Width of the token table: E where factorised, else D."""
        return self.factorized_embedding_dim if self.use_factorized_embedding else self.hidden_size


class Embeddings(nn.Module):
    """x_t = dropout(norm(scale (P (e_t + conv(e)_t) + position_t))), zero at padding (arXiv 1810.04805, 1909.11942).

    Each part but the table is there only where the config asks for it. Token vectors e are of the narrow width where
    factorised, and P (no bias, initial variance 1 / E, so that it keeps theirs) brings them to D. The convolution is
    dense over the narrow channels, centred, and does not leave the document; the e_t beside it makes its initial tap
    the identity and adds nothing that a tap could not learn. Positions are added at width D and restart with each
    document; the sinusoidal ones bear a learned scale of initial value D^-0.5, about that of the tokens. ``scale`` is
    a learned number of initial value D^0.5 before norms without statistics (arXiv 2503.10622): those would otherwise
    pass on vectors of size 0.02.

    Args:
        config: Widths and parts.
        norm: Norm over D; an attribute ``has_statistics`` that is False asks for ``scale``.
    """

    def __init__(self, config: EmbeddingConfig, norm: nn.Module) -> None:
        super().__init__()
        self.config = config
        D, width = config.hidden_size, config.width
        self.tokens = nn.Embedding(config.vocab_size, width)
        nn.init.normal_(self.tokens.weight, std=config.initializer_range)
        convolved = config.use_embedding_conv and config.use_factorized_embedding
        self.conv = SegmentConv1d(width, width, config.embedding_conv_kernel) if convolved else None
        self.projection: nn.Linear | None = None
        if config.use_factorized_embedding:
            self.projection = nn.Linear(width, D, bias=False)
            nn.init.normal_(self.projection.weight, std=width**-0.5)
        self.positions: nn.Embedding | None = None
        if config.position_embedding == "learned":
            self.positions = nn.Embedding(config.max_position_embeddings, D)
            nn.init.normal_(self.positions.weight, std=config.initializer_range)
            self.positions.weight._no_weight_decay = True  # type: ignore[attr-defined]
        sinusoidal = config.position_embedding == "sinusoidal"
        self.position_scale = nn.Parameter(torch.full((1,), D**-0.5)) if sinusoidal else None
        self.scale = None if getattr(norm, "has_statistics", True) else nn.Parameter(torch.full((1,), D**0.5))
        self.norm = norm
        self.dropout = Dropout(config.dropout)

    def forward(self, input_ids: Tensor, segments: Tensor | None = None) -> Tensor:
        """Embed ids.

        Args:
            input_ids: (B, L) int64 in [0, V).
            segments: (B, L) document ids, 0 at padding, or None.

        Returns:
            (B, L, D).

        Raises:
            ConfigError: The row is longer than the table of learned positions.
        """
        x = mask_padding(self.tokens(input_ids), segments)  # (B, L, E)
        if self.conv is not None:
            x = x + self.conv(x, segments)
        if self.projection is not None:
            x = self.projection(x)
        place = self._positions(input_ids, segments)
        x = x if place is None else x + place
        x = x if self.scale is None else x * self.scale
        return mask_padding(self.dropout(self.norm(x)), segments)

    def _positions(self, input_ids: Tensor, segments: Tensor | None) -> Tensor | None:
        """Return (B or 1, L, D) to add, or None where positions are none of the embeddings' business."""
        length = input_ids.shape[1]
        if self.positions is not None:
            limit = self.config.max_position_embeddings
            if length > limit:
                raise ConfigError(
                    f"model.max_position_embeddings: got a row of {length} tokens, expected at most {limit}; raise it, "
                    "shorten the rows (training.max_length), or use position_embedding rope or sinusoidal"
                )
            return self.positions(positions(segments, length, input_ids.device))
        if self.position_scale is not None:
            table = sinusoids(length, self.config.hidden_size, input_ids.device).to(self.position_scale.dtype)
            return self.position_scale * F.embedding(positions(segments, length, input_ids.device), table)
        return None


def sinusoids(length: int, width: int, device: torch.device | None = None) -> Tensor:
    """S[t, 2j] = sin(t 10000^(-2j/D)), S[t, 2j+1] = cos(t 10000^(-2j/D)) (arXiv 1706.03762).

    Args:
        length: Positions, from 0.
        width: D; the last cosine is left out where it is odd.
        device: Where the result lives.

    Returns:
        (length, width) fp32.
    """
    rates = torch.exp(torch.arange(0, width, 2, device=device, dtype=torch.float32) * (-math.log(10000.0) / width))
    angles = torch.arange(length, device=device, dtype=torch.float32).unsqueeze(1) * rates  # (length, ceil(D / 2))
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :width]


class MaskedLMHead(nn.Module):
    """logits = T norm(act(W h + b)) + c, T the token table where tied (arXiv 1810.04805; factorised: 1909.11942).

    W leads from D to the width of the token table, so a factorised head is V x E as well, tied or not. Before a norm
    without statistics stands a learned number ``scale``, of initial value 8 / (initializer_range D^0.5): h comes out of
    such a norm too, at about a quarter of unit size, W makes that initializer_range D^0.5 times as large and the
    activation halves it. Passed on as small as that, the bias alone would be learned for thousands of steps.

    Args:
        config: Widths, activation, tying.
        norm: Norm over the width of the token table; an attribute ``has_statistics`` that is False asks for ``scale``.
    """

    def __init__(self, config: EmbeddingConfig, norm: nn.Module) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.width)
        nn.init.normal_(self.dense.weight, std=config.initializer_range)
        nn.init.zeros_(self.dense.bias)
        self.activation: Callable[[Tensor], Tensor] = ACTIVATIONS[config.ffn_activation]
        unit = 8 / (config.initializer_range * config.hidden_size**0.5)
        self.scale = None if getattr(norm, "has_statistics", True) else nn.Parameter(torch.full((1,), unit))
        self.norm = norm
        self.decoder: nn.Linear | None = None
        if not config.tie_word_embeddings:
            self.decoder = nn.Linear(config.width, config.vocab_size, bias=False)
            nn.init.normal_(self.decoder.weight, std=config.initializer_range)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    @torch.no_grad()
    def start_from(self, counts: Tensor) -> None:
        """Set the bias to the log share of each token, one added to every count: the guess that sees no context.

        An optimiser that moves each number by about the learning rate takes hundreds of steps to get there by itself.

        Args:
            counts: (at most V,) occurrences by token id; later ids count as not seen.
        """
        seen = torch.ones_like(self.bias)
        seen[: counts.numel()] += counts.to(seen)
        self.bias.copy_(torch.log(seen / seen.sum()))

    def forward(self, hidden: Tensor, table: Tensor) -> Tensor:
        """Score the vocabulary.

        Args:
            hidden: (..., D).
            table: (V, width), the token table; not read where the head has a decoder of its own.

        Returns:
            (..., V).
        """
        weight = table if self.decoder is None else self.decoder.weight
        x = self.activation(self.dense(hidden))
        x = x if self.scale is None else x * self.scale
        return F.linear(self.norm(x), weight, self.bias)
