"""EmbBERT's embeddings: narrow tokens and narrow positions, each with a projection, and the two sentences of a pair."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ultrazoo.nn.block_config import BlockConfig
from ultrazoo.nn.segments import Gaps, mask_padding, positions
from ultrazoo.spec import BlockSpec

SENTENCES = 3
"""Rows of the sentence table: padding, before the first separator, and from it on."""


class EmbBERTEmbeddingConfig(BlockConfig):
    """Options of ``embbert_embedding``."""

    vocab_size: int = Field(gt=0, description="Entries V of the vocabulary; 0 is padding.")
    hidden_size: int = Field(gt=0, description="Model width D.")
    use_factorized_embedding: bool = Field(default=True, description="Narrow tables; else they are D wide.")
    factorized_embedding_dim: int = Field(gt=0, description="Width r of the narrow tables.")
    position_embedding: Literal["none", "learned", "sinusoidal", "rope"] = Field(
        default="learned", description="learned, as published; none and rope leave the table of positions out."
    )
    max_position_embeddings: int = Field(gt=0, description="Rows of the table of positions.")
    initializer_range: float = Field(default=0.02, gt=0, description="Standard deviation of the initial tables.")
    separator_id: int = Field(default=3, ge=0, description="Token at which the second sentence begins, [SEP].")

    @model_validator(mode="after")
    def _check_positions(self) -> EmbBERTEmbeddingConfig:
        if self.position_embedding == "sinusoidal":
            raise ValueError("got position_embedding 'sinusoidal', expected learned, rope or none; it has no sinusoids")
        return self

    @property
    def width(self) -> int:
        """Width r of the tables of tokens and positions."""
        return self.factorized_embedding_dim if self.use_factorized_embedding else self.hidden_size


class EmbBERTEmbeddings(nn.Module):
    """x_t = e_t W_1 + p_t W_2 + s_t, zero at padding: no norm, no dropout, no bias (arXiv 2502.10001).

    Positions and sentences begin anew with each document. The tables start from N(0, initializer_range^2) where the
    authors' start from N(0, 1); the first norm cancels the factor, and a tied head wants small ones. The projections
    start as torch's do. Parameters: V r + r D + M r + r D + 3 D, with M positions.

    Args:
        config: Widths and options.
    """

    def __init__(self, config: EmbBERTEmbeddingConfig) -> None:
        super().__init__()
        width, narrow = config.hidden_size, config.width
        self.separator_id = config.separator_id
        self.tokens = nn.Embedding(config.vocab_size, narrow, padding_idx=0)
        self.projection = nn.Linear(narrow, width, bias=False)
        self.sentences = nn.Embedding(SENTENCES, width, padding_idx=0)
        for table in (self.tokens, self.sentences):
            nn.init.normal_(table.weight, std=config.initializer_range)
            with torch.no_grad():
                table.weight[0].zero_()
        self.sentences.weight._no_weight_decay = True  # type: ignore[attr-defined]
        self.positions: nn.Embedding | None = None
        if config.position_embedding == "learned":
            self.positions = nn.Embedding(config.max_position_embeddings, narrow)
            self.position_projection = nn.Linear(narrow, width, bias=False)
            nn.init.normal_(self.positions.weight, std=config.initializer_range)
            self.positions.weight._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(self, input_ids: Tensor, segments: Tensor | None = None) -> Tensor:
        """Embed ids.

        Args:
            input_ids: (B, L) int64 in [0, V).
            segments: (B, L) document ids, 0 at padding, or None.

        Returns:
            (B, L, D).

        Raises:
            ValueError: The row is longer than the table of positions.
        """
        gaps = Gaps.of(segments)  # a document begins at its token's place in the row less its position
        input_ids, segments = gaps.close(input_ids), gaps.segments
        length = input_ids.shape[1]
        place = positions(segments, length, input_ids.device)  # (B or 1, L)
        x = self.projection(self.tokens(input_ids)) + self.sentences(self._sentence(input_ids, place))
        if self.positions is not None:
            if length > self.positions.num_embeddings:
                raise ValueError(
                    f"embbert_embedding: got a row of {length} tokens, expected at most "
                    f"{self.positions.num_embeddings}; raise model.max_position_embeddings, or shorten the rows"
                )
            x = x + self.position_projection(self.positions(place))
        return gaps.open(mask_padding(x, segments))

    def _sentence(self, input_ids: Tensor, place: Tensor) -> Tensor:
        """1 before the first separator of the document, 2 from it on, 0 for the padding token; (B, L)."""
        is_separator = input_ids.eq(self.separator_id).long()
        seen = is_separator.cumsum(1)
        start = torch.arange(input_ids.shape[1], device=input_ids.device) - place  # of the token's document
        before = (seen - is_separator).gather(1, start.expand_as(seen))
        return (1 + seen.gt(before).long()).masked_fill(input_ids.eq(0), 0)


SPEC = BlockSpec(
    name="embbert_embedding",
    kind="embedding",
    module=EmbBERTEmbeddings,
    config=EmbBERTEmbeddingConfig,
    paper="arXiv 2502.10001",
    equation="x_t = e_t W_1 + p_t W_2 + s_t",
    state_size=lambda config: 0,
)
