"""The encoder and its masked-language-modelling head, built from the names in the config."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ultrazoo.callables import construct
from ultrazoo.config import ModelConfig, block_config
from ultrazoo.nn.dropout import Dropout
from ultrazoo.nn.embeddings import EmbeddingConfig, Embeddings, MaskedLMHead
from ultrazoo.nn.segments import checked, mask_padding, shared
from ultrazoo.nn.tiles import ROW_TILE
from ultrazoo.registry import registry

IGNORED = -100
"""Label of a position that is not a target."""

Aux = dict[str, Tensor]


@dataclass
class MaskedLMOutput:
    """What one forward pass gives; the objective is ``loss_sum / num_targets + sum(losses.values())``."""

    hidden: Tensor
    """(B, L, D), zero at padding."""
    logits: Tensor
    """(B, L, V); with labels (M, V), one row per target in reading order."""
    loss_sum: Tensor | None = None
    """Scalar fp32, cross-entropy in nats summed over the targets; None without labels."""
    num_targets: int = 0
    losses: Aux = field(default_factory=dict)
    """Auxiliary losses, coefficient included, each a mean over layers and loops."""
    stats: Aux = field(default_factory=dict)
    """Detached statistics of the feed-forwards: (num_layers, ...), each a mean over loops."""
    factors: Aux = field(default_factory=dict)
    """Losses that are products, by name: (num_loops num_layers, 2, K), one mean over tokens without a gradient and one
    with; the loss is their product, summed over K."""


class EncoderLayer(nn.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x)); with post norm, norm(x + mixer(x)), then norm(x + ffn(x)).

    Without ``x +``, and without dropout, for a mixer whose spec says ``residual=False``; without the second half where
    ``ffn_type`` is none.

    Args:
        config: The model section.
        position: Position in ``layer_pattern`` that says the mixer and its options.
    """

    def __init__(self, config: ModelConfig, position: int) -> None:
        super().__init__()
        self.mixer_name, self.ffn_name = config.mixer_names[position], config.ffn_name
        own = (f" {name}={value}" for name, value in config.own_options(position).items())
        self.mixer_label, self.ffn_label = self.mixer_name + "".join(own), self.ffn_name
        """Names as the parameter table has them, with the options of this position."""
        self.pre_norm = config.norm_position == "pre"
        self.mixer_norm = _norm(config, config.hidden_size)
        self.mixer = _block(config, "mixer", self.mixer_name, position)
        self.residual = registry().block("mixer", self.mixer_name).residual
        has_ffn = config.ffn_name != "none"
        self.ffn_norm = _norm(config, config.hidden_size) if has_ffn else None
        self.ffn = _block(config, "ffn", config.ffn_name) if has_ffn else None
        self.dropout = Dropout(config.dropout)
        self.recompute = False
        """Keep only the layer's input for the backward pass, and run the layer once more there."""

    def forward(self, x: Tensor, segments: Tensor | None = None) -> tuple[Tensor, Aux]:
        """Apply mixer and feed-forward.

        Args:
            x: (B, L, D).
            segments: (B, L) document ids, 0 at padding, or None.

        Returns:
            (B, L, D), and the auxiliary values of the feed-forward.
        """
        if self.recompute and torch.is_grad_enabled():
            result: tuple[Tensor, Aux] = checkpoint(self._apply_parts, x, segments, use_reentrant=False)
            return result
        return self._apply_parts(x, segments)

    def _apply_parts(self, x: Tensor, segments: Tensor | None) -> tuple[Tensor, Aux]:
        y = self.mixer(self.mixer_norm(x) if self.pre_norm else x, segments)
        x = x + self.dropout(y) if self.residual else y
        x = x if self.pre_norm else self.mixer_norm(x)
        if self.ffn is None or self.ffn_norm is None:
            return x, {}
        y, aux = self.ffn(self.ffn_norm(x) if self.pre_norm else x, segments)
        x = x + self.dropout(y)
        return x if self.pre_norm else self.ffn_norm(x), aux


class MaskedLM(nn.Module):
    """A stack of layers applied ``num_loops`` times with the same weights, between embeddings and a head.

    With pre norm a last norm closes the stack, unless the last layer is a mixer without residual, whose output is no
    sum. Every block draws its own initial weights; the model changes none.

    Args:
        config: The model section.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        shared = EmbeddingConfig.model_validate({name: getattr(config, name) for name in EmbeddingConfig.model_fields})
        self.embeddings: nn.Module = (
            Embeddings(shared, _norm(config, config.hidden_size))
            if config.embedding_type is None
            else _block(config, "embedding", config.embedding_type)
        )
        period = len(config.layer_pattern)
        self.layers = nn.ModuleList(EncoderLayer(config, i % period) for i in range(config.num_layers))
        last = self.layers[-1]
        closes = config.norm_position == "pre" and (last.residual or last.ffn is not None)
        self.final_norm = _norm(config, config.hidden_size) if closes else None
        self.head = MaskedLMHead(shared, _norm(config, shared.width))

    def recompute_layers(self, wanted: bool = True) -> None:
        """Let each layer keep only its input for the backward pass; the numbers stay the same, dropout included."""
        for layer in self.layers:
            layer.recompute = wanted  # type: ignore[assignment]

    def encode(self, input_ids: Tensor, segments: Tensor | None = None) -> Tensor:
        """Return the last hidden states.

        Args:
            input_ids: (B, L) int64.
            segments: (B, L) document ids, 0 at padding, each document one run of tokens (padding may be inside it);
                None means that every row is one full document.

        Returns:
            (B, L, D), zero at padding.
        """
        return self._encode(input_ids, segments)[0]

    def forward(
        self, input_ids: Tensor, segments: Tensor | None = None, labels: Tensor | None = None
    ) -> MaskedLMOutput:
        """Score the vocabulary, at every position or only where there is a target.

        Args:
            input_ids: (B, L) int64.
            segments: (B, L) document ids, 0 at padding, each document one run of tokens (padding may be inside it);
                None means that every row is one full document.
            labels: (B, L) int64, -100 where there is no target.
        """
        hidden, *aux = self._encode(input_ids, segments)
        table = self.embeddings.get_parameter("tokens.weight")
        if labels is None:
            return MaskedLMOutput(hidden, self.head(hidden, table), None, 0, *aux)
        targets = labels.reshape(-1)
        places = targets.ne(IGNORED).nonzero().squeeze(1)  # (M,)
        count = places.numel()
        extra = -count % ROW_TILE
        rows = hidden.flatten(0, 1).index_select(0, F.pad(places, (0, extra)))  # the first position again, as no target
        logits = self.head(rows, table)  # (M + extra, V)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        wanted = F.pad(targets.index_select(0, places), (0, extra), value=IGNORED)
        loss_sum = F.cross_entropy(wide, wanted, ignore_index=IGNORED, reduction="sum")
        return MaskedLMOutput(hidden, logits[:count], loss_sum, count, *aux)

    def _encode(self, input_ids: Tensor, segments: Tensor | None) -> tuple[Tensor, Aux, Aux, Aux]:
        if segments is not None and segments.shape != input_ids.shape:
            raise ValueError(
                f"segments: got shape {tuple(segments.shape)}, expected that of input_ids {tuple(input_ids.shape)}"
            )
        if segments is None or torch.compiler.is_compiling():
            return self._run(input_ids, None if segments is None else checked(segments))
        with shared(segments) as known:
            return self._run(input_ids, known)

    def _run(self, input_ids: Tensor, segments: Tensor | None) -> tuple[Tensor, Aux, Aux, Aux]:
        x = self.embeddings(input_ids, segments)
        seen: list[Aux] = []
        for _ in range(self.config.num_loops):
            for layer in self.layers:
                x, aux = layer(x, segments)
                seen.append(aux)
        x = x if self.final_norm is None else self.final_norm(x)
        return mask_padding(x, segments), *_gather(seen, self.config.num_layers)


def build_model(config: ModelConfig) -> MaskedLM:
    """Build an untrained model; weights are drawn from torch's global random stream.

    Raises:
        ConfigError: A block refuses its options.
    """
    return MaskedLM(config)


def parameter_table(model: MaskedLM) -> list[tuple[str, int]]:
    """Count the parameters by part, in the order of the forward pass; they add up to the whole, each counted once."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = _part(model, name)
        counts[part] = counts.get(part, 0) + parameter.numel()
    order = list(_PARTS.values())
    after = order.index("other embeddings")
    return sorted(counts.items(), key=lambda item: order.index(item[0]) if item[0] in order else after + 0.5)


_PARTS = {
    "embeddings.tokens": "token embeddings",
    "embeddings.conv": "embedding convolution",
    "embeddings.projection": "embedding projection",
    "embeddings.positions": "position embeddings",
    "embeddings.position_scale": "embedding scales",
    "embeddings.scale": "embedding scales",
    "embeddings.norm": "embedding norm",
    "embeddings": "other embeddings",  # a plugin's own; the parts of the layers follow
    "final_norm": "final norm",
    "head.dense": "head transform",
    "head.scale": "head scale",
    "head.norm": "head norm",
    "head.decoder": "head decoder",
    "head.bias": "head bias",
}


def _part(model: MaskedLM, name: str) -> str:
    if not name.startswith("layers."):
        return next(part for prefix, part in _PARTS.items() if name == prefix or name.startswith(prefix + "."))
    _, index, member, *_ = name.split(".")
    if member not in ("mixer", "ffn"):
        return "layer norms"
    block = getattr(model.layers[int(index)], f"{member}_label")
    number = sum(getattr(layer, f"{member}_label") == block for layer in model.layers)
    return f"{member} {block} (x {number})"


def _norm(config: ModelConfig, width: int) -> nn.Module:
    """Build the norm that the config names, for a width that need not be the model's."""
    spec = registry().block("norm", config.norm_type, "model.norm_type")
    options = block_config(spec, config)
    return construct(spec, options.model_copy(update={"hidden_size": width}))


def _block(config: ModelConfig, kind: str, name: str, position: int | None = None) -> nn.Module:
    spec = registry().block(kind, name, f"model ({kind})")
    return construct(spec, block_config(spec, config, position))


def _gather(seen: list[Aux], num_layers: int) -> tuple[Aux, Aux, Aux]:
    """Join the auxiliary values of the layers, met loop after loop: losses, statistics, factors."""
    losses, stats, factors = {}, {}, {}
    for key in seen[0]:
        values = torch.stack([aux[key] for aux in seen])  # (num_loops num_layers, ...)
        if key.endswith("_loss"):
            losses[key] = values.mean()
        elif key.endswith("_factors"):
            factors[key.removesuffix("_factors") + "_loss"] = values
        else:
            stats[key] = values.detach().unflatten(0, (-1, num_layers)).mean(0)
    return losses, stats, factors
