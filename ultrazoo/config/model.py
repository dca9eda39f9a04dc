"""The model section: the fields of the config reference, and what they lacked."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from ultrazoo.callables import failure
from ultrazoo.config.layers import BlockUse, Layer
from ultrazoo.config.problems import ProblemsError, problems_of
from ultrazoo.errors import ConfigError, PluginError, UnknownNameError, did_you_mean
from ultrazoo.options import Options
from ultrazoo.registry import registry
from ultrazoo.spec import BlockSpec

SWITCHED = {
    "hope_base": "use_hope",
    "hope_damping": "use_hope",
    "factorized_embedding_dim": "use_factorized_embedding",
    "embedding_conv_kernel": "use_embedding_conv",
    "num_experts": "use_moe",
    "top_k_experts": "use_moe",
    "router_aux_loss_coef": "use_moe",
    "router_z_loss_coef": "use_moe",
}
"""Fields that act only when a switch is on."""
READ_BY_SOME = ("num_heads", "retention_heads", "ode_solver", "ode_steps", "ffn_hidden_size")
"""Fields that act only where a block in use reads them."""


class ModelConfig(Options):
    """Shape and parts of an encoder."""

    vocab_size: int = Field(50000, ge=6, description="Entries of the vocabulary, special tokens included.")
    hidden_size: int = Field(768, ge=1, description="Model width D.")
    num_layers: int = Field(12, ge=1, description="Physical layers; layer_pattern is repeated over them.")
    num_loops: int = Field(1, ge=1, description="Times the stack of layers is applied, with shared weights.")
    num_heads: int = Field(12, ge=1, description="Attention heads.")
    retention_heads: int = Field(12, ge=1, description="Retention heads.")
    num_experts: int = Field(4, ge=1, description="Experts of the mixture; needs use_moe.")
    top_k_experts: int = Field(2, ge=1, description="Experts that each token visits; needs use_moe.")
    dropout: float = Field(0.1, ge=0, lt=1, description="Dropout probability of embeddings, blocks and attention.")
    layer_pattern: tuple[Layer, ...] = Field(
        ("standard_attn",),
        min_length=1,
        description="Mixer of each layer by name, or with options of its own: {block: NAME, option: value}.",
    )
    ode_solver: Literal["rk4", "euler"] = Field("rk4", description="Integrator of the ode block.")
    ode_steps: int = Field(2, ge=1, description="Integration steps of the ode block over t in [0, 1].")
    use_bitnet: bool = Field(False, description="BitLinear (b1.58) in place of the blocks' linear layers.")
    norm_type: str = Field("layer_norm", description="Norm of the residual stream.")
    use_factorized_embedding: bool = Field(False, description="Embed in a narrow width, then project up.")
    factorized_embedding_dim: int = Field(128, ge=1, description="Width of factorised embeddings.")
    use_embedding_conv: bool = Field(False, description="Convolution on the factorised embeddings.")
    embedding_conv_kernel: int = Field(3, ge=1, description="Width of that convolution, in tokens.")
    hope_base: float = Field(10000.0, gt=1, description="Base of HoPE's frequencies.")
    hope_damping: float = Field(0.01, ge=0, description="Decay of HoPE per token, beyond the pair's frequency.")
    use_hope: bool = Field(False, description="Hyperbolic rotary position encoding in titan_attn.")
    use_moe: bool = Field(False, description="Mixture of experts in place of the dense feed-forward.")
    ffn_hidden_size: int = Field(3072, ge=1, description="Inner width of the feed-forward.")
    ffn_activation: Literal["silu", "gelu"] = Field("gelu", description="Activation of the feed-forward.")

    ffn_type: str = Field("mlp", description="Feed-forward block by name, or none; use_moe selects 'moe'.")
    embedding_type: str | None = Field(None, description="Embedding block by name, of a plugin; unset: the built-in.")
    tie_word_embeddings: bool = Field(True, description="The output head uses the token embeddings.")
    position_embedding: Literal["none", "learned", "sinusoidal", "rope"] | None = Field(
        None, description="Positions; unset: rope, or none where HoPE serves every layer or no block rotates."
    )
    max_position_embeddings: int = Field(512, ge=1, description="Longest document with learned positions.")
    norm_position: Literal["pre", "post"] = Field("pre", description="Norm before each block, or after its residual.")
    norm_eps: float = Field(1e-5, gt=0, description="Epsilon of layer_norm and rms_norm.")
    initializer_range: float = Field(0.02, gt=0, description="Standard deviation of initial weights.")
    router_aux_loss_coef: float = Field(0.01, ge=0, description="Weight of the load-balancing loss.")
    router_z_loss_coef: float = Field(0.001, ge=0, description="Weight of the router's z-loss.")
    block_options: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="Options of single blocks: block name -> option -> value."
    )

    @property
    def mixer_names(self) -> tuple[str, ...]:
        """Name of the mixer at each position of ``layer_pattern``."""
        return tuple(layer if isinstance(layer, str) else layer.block for layer in self.layer_pattern)

    @property
    def ffn_name(self) -> str:
        """Name of the feed-forward block."""
        return "moe" if self.use_moe else self.ffn_type

    @property
    def blocks_used(self) -> tuple[tuple[str, str], ...]:
        """Kind and name of each block that the model is made of, each once."""
        mixers = [("mixer", name) for name in self.mixer_names]
        return tuple(dict.fromkeys([*mixers, *self._single_blocks]))

    @property
    def _single_blocks(self) -> dict[tuple[str, str], str]:
        """Kind and name of the blocks that all layers share or that there is one of, and the field that names each."""
        found = {("norm", self.norm_type): "model.norm_type"}
        if self.ffn_name != "none":
            found["ffn", self.ffn_name] = "model.ffn_type"
        if self.embedding_type is not None:
            found["embedding", self.embedding_type] = "model.embedding_type"
        return found

    def own_options(self, position: int) -> dict[str, Any]:
        """Return the options that one position of ``layer_pattern`` sets for itself."""
        layer = self.layer_pattern[position]
        return layer.options if isinstance(layer, BlockUse) else {}

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        lines: list[str] = []
        specs = self._known_specs(lines)
        if self.position_embedding is None:
            blind = {spec.name for spec in specs if "position_embedding" in spec.config.model_fields}
            hope = {spec.name for spec in specs if "use_hope" in spec.config.model_fields}
            # frozen for users; a default that depends on other fields is settled here, once
            unused = not blind or (self.use_hope and blind == hope)
            self.__dict__["position_embedding"] = "none" if unused else "rope"
        lines += self._contradictions()
        known = {(str(spec.kind), spec.name): spec for spec in specs}
        uses = [("mixer", name, position) for position, name in enumerate(self.mixer_names)]
        for kind, name, position in [*uses, *((*block, None) for block in self._single_blocks)]:
            try:
                if (kind, name) in known:
                    block_config(known[kind, name], self, position)
            except ConfigError as error:
                lines += str(error).splitlines()
        if lines:
            raise ProblemsError(list(dict.fromkeys(lines)))
        return self

    def _known_specs(self, lines: list[str]) -> list[BlockSpec]:
        zoo, found = registry(), []
        places = [("mixer", name, f"model.layer_pattern[{i}]") for i, name in enumerate(self.mixer_names)]
        places += [(*block, where) for block, where in self._single_blocks.items()]
        for kind, name, where in places:
            try:
                found.append(zoo.block(kind, name, where))
            except (UnknownNameError, PluginError) as error:
                lines.append(str(error))
        for name in self.block_options:
            try:
                zoo.find_block(name, f"model.block_options.{name}")
            except (UnknownNameError, PluginError) as error:
                if name not in {place for _, place, _ in places}:  # reported above otherwise
                    lines.append(str(error))
        return list({spec.name: spec for spec in found}.values())

    def _contradictions(self) -> list[str]:
        """Settings that contradict each other."""
        lines = []
        if self.use_moe and self.ffn_type != "mlp":
            lines.append(
                f"model.ffn_type: got {self.ffn_type!r} with use_moe true, which selects 'moe'; set one of them"
            )
        if self.use_factorized_embedding and self.factorized_embedding_dim >= self.hidden_size:
            lines.append(
                f"model.factorized_embedding_dim: got {self.factorized_embedding_dim}, expected less than hidden_size "
                f"{self.hidden_size}; set use_factorized_embedding to false, or a narrower width"
            )
        return lines

    def notices(self) -> list[str]:
        """Values that were set by hand and have no effect on this model, each with the reason."""
        specs = [registry().block(kind, name) for kind, name in self.blocks_used]
        read = {field for spec in specs for field in spec.config.model_fields}
        lines = self._idle_switches(read)
        for field in sorted(self.model_fields_set):
            switch = SWITCHED.get(field)
            if switch and not getattr(self, switch):
                lines.append(f"model.{field}: has no effect while {switch} is false")
            elif field in READ_BY_SOME and field not in read:
                users = ", ".join(registry().readers_of(field))
                lines.append(f"model.{field}: has no effect without one of: {users}")
            elif field == "max_position_embeddings" and self.position_embedding != "learned":
                lines.append(f"model.{field}: has no effect unless position_embedding is learned")
        for name, options in self.block_options.items():
            uses = [self.own_options(i) for i, mixer in enumerate(self.mixer_names) if mixer == name]
            if name not in {spec.name for spec in specs}:
                used = ", ".join(sorted({spec.name for spec in specs}))
                lines.append(
                    f"model.block_options.{name}: has no effect: no layer uses this block; blocks in use: {used}"
                )
            for option in options:
                if uses and all(option in own for own in uses):
                    lines.append(
                        f"model.block_options.{name}.{option}: has no effect, for every layer of the block sets its own"
                    )
        return lines

    def _idle_switches(self, read: set[str]) -> list[str]:
        """Return a notice for each switch that is on and has no effect, given the fields that the blocks read."""
        lines = []
        mixers = list(self.mixer_names)
        for switch in ("use_hope", "use_bitnet"):
            if getattr(self, switch) and switch not in read:
                users = ", ".join(registry().readers_of(switch))
                lines.append(
                    f"model.{switch}: has no effect: no block of layer_pattern {mixers} reads it, only: {users}"
                )
        if self.use_embedding_conv and self.embedding_type and "use_embedding_conv" not in read:
            lines.append(
                f"model.use_embedding_conv: has no effect: embedding_type {self.embedding_type!r} does not read it"
            )
        elif self.use_embedding_conv and not self.use_factorized_embedding:
            lines.append(
                "model.use_embedding_conv: has no effect while use_factorized_embedding is false; the convolution runs "
                "on factorised embeddings"
            )
        if self.position_embedding == "rope" and "position_embedding" not in read:
            lines.append(
                f"model.position_embedding: 'rope' has no effect: no block of layer_pattern {mixers} rotates its "
                "queries and keys; use learned, sinusoidal or none"
            )
        return lines


def block_config(spec: BlockSpec, model: ModelConfig, position: int | None = None) -> BaseModel:
    """Build a block's own options from the model section, ``block_options`` and one position of ``layer_pattern``.

    Args:
        spec: The block.
        model: The model section.
        position: Where it stands in ``layer_pattern``, whose own options win; None for no such place.

    Raises:
        ConfigError: An option is unknown, out of range, or already given by the model section.
    """
    shared = {name: getattr(model, name) for name in spec.config.model_fields if name in ModelConfig.model_fields}
    for_block, for_layer = (
        model.block_options.get(spec.name, {}),
        {} if position is None else model.own_options(position),
    )
    section = f"model.block_options.{spec.name}"
    homes = dict.fromkeys(for_block, section) | dict.fromkeys(for_layer, f"model.layer_pattern[{position}]")
    options = [name for name in spec.config.model_fields if name not in shared]
    lines = []
    for name, where in homes.items():
        if name in ModelConfig.model_fields:
            lines.append(f"{where}.{name}: set it as model.{name}; it is shared by all blocks")
        elif name not in options and spec.config.model_config.get("extra") != "allow":
            known = ", ".join(sorted(options)) or "none"
            lines.append(f"{where}.{name}: unknown field; {did_you_mean(name, options)}known: {known}")
    if lines:
        raise ConfigError("\n".join(lines))
    try:
        return spec.config(**shared, **{**for_block, **for_layer})
    except ValidationError as error:

        def prefix(loc: tuple[int | str, ...]) -> str:
            if not loc:
                return f"model ({spec.name})" if not for_layer else f"model.layer_pattern[{position}] ({spec.name})"
            return "model" if loc[0] in shared else homes.get(str(loc[0]), section)

        raise ConfigError("\n".join(problems_of(error, prefix, options))) from error
    except (Exception, SystemExit) as error:  # of a validator or a default of the plugin's
        raise failure(f"block {spec.name!r}: {spec.config.__name__}", error, spec.config) from error
