"""The model section: the fields of the config reference, and what they lacked."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ultrazoo.config.problems import ProblemsError, problems_of
from ultrazoo.errors import ConfigError, UnknownNameError
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


class ModelConfig(BaseModel):
    """Shape and parts of an encoder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocab_size: int = Field(50000, ge=6, description="Entries of the vocabulary, special tokens included.")
    hidden_size: int = Field(768, ge=1, description="Model width D.")
    num_layers: int = Field(12, ge=1, description="Physical layers; layer_pattern is repeated over them.")
    num_loops: int = Field(1, ge=1, description="Times the stack of layers is applied, with shared weights.")
    num_heads: int = Field(12, ge=1, description="Attention heads.")
    retention_heads: int = Field(12, ge=1, description="Retention heads.")
    num_experts: int = Field(4, ge=1, description="Experts of the mixture; needs use_moe.")
    top_k_experts: int = Field(2, ge=1, description="Experts that each token visits; needs use_moe.")
    dropout: float = Field(0.1, ge=0, lt=1, description="Dropout probability of embeddings, blocks and attention.")
    layer_pattern: tuple[str, ...] = Field(("standard_attn",), min_length=1, description="Mixer of each layer.")
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

    ffn_type: str = Field("mlp", description="Feed-forward block by name; use_moe selects 'moe'.")
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
    def ffn_name(self) -> str:
        """Name of the feed-forward block."""
        return "moe" if self.use_moe else self.ffn_type

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
        lines += self._without_effect(specs)
        for spec in specs:
            try:
                block_config(spec, self)
            except ConfigError as error:
                lines += str(error).splitlines()
        if lines:
            raise ProblemsError(list(dict.fromkeys(lines)))
        return self

    def _known_specs(self, lines: list[str]) -> list[BlockSpec]:
        zoo, found = registry(), []
        places = [("mixer", name, f"model.layer_pattern[{i}]") for i, name in enumerate(self.layer_pattern)]
        places += [("ffn", self.ffn_name, "model.ffn_type"), ("norm", self.norm_type, "model.norm_type")]
        for kind, name, where in places:
            try:
                found.append(zoo.block(kind, name, where))
            except UnknownNameError as error:
                lines.append(str(error))
        for name in self.block_options:
            if name not in {spec.name for spec in found}:
                lines.append(
                    f"model.block_options.{name}: no layer uses this block, so its options cannot act; "
                    f"blocks in use: {', '.join(sorted({spec.name for spec in found}))}"
                )
        return list({spec.name: spec for spec in found}.values())

    def _without_effect(self, specs: list[BlockSpec]) -> list[str]:
        """Switches that are on and cannot act, given the blocks in use."""
        read = {field for spec in specs for field in spec.config.model_fields}
        lines = []
        for switch in ("use_hope", "use_bitnet"):
            if getattr(self, switch) and switch not in read:
                users = registry().readers_of(switch)
                lines.append(
                    f"model.{switch}: got true, but no block of layer_pattern {list(self.layer_pattern)} reads it; "
                    f"set it to false, or use one of: {', '.join(users)}"
                )
        rope_by_hand = self.position_embedding == "rope" and "position_embedding" in self.model_fields_set
        if rope_by_hand and "position_embedding" not in read:
            lines.append(
                f"model.position_embedding: got 'rope', but no block of layer_pattern {list(self.layer_pattern)} "
                "rotates its queries and keys; use learned, sinusoidal or none"
            )
        if self.use_embedding_conv and not self.use_factorized_embedding:
            lines.append(
                "model.use_embedding_conv: got true with use_factorized_embedding false; the convolution runs on the "
                "factorised embeddings: set use_factorized_embedding to true (model_class mini does)"
            )
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
        specs = [registry().block("mixer", name) for name in self.layer_pattern]
        specs += [registry().block("ffn", self.ffn_name), registry().block("norm", self.norm_type)]
        read = {field for spec in specs for field in spec.config.model_fields}
        lines = []
        for field in sorted(self.model_fields_set):
            switch = SWITCHED.get(field)
            if switch and not getattr(self, switch):
                lines.append(f"model.{field}: has no effect while {switch} is false")
            elif field in ("num_heads", "retention_heads", "ode_solver", "ode_steps") and field not in read:
                users = ", ".join(registry().readers_of(field))
                lines.append(f"model.{field}: has no effect without one of: {users}")
            elif field == "max_position_embeddings" and self.position_embedding != "learned":
                lines.append(f"model.{field}: has no effect unless position_embedding is learned")
        return lines


def block_config(spec: BlockSpec, model: ModelConfig) -> BaseModel:
    """Build a block's own options from the model section and ``block_options``.

    Raises:
        ConfigError: An option is unknown, out of range, or already given by the model section.
    """
    shared = {name: getattr(model, name) for name in spec.config.model_fields if name in ModelConfig.model_fields}
    own = model.block_options.get(spec.name, {})
    where = f"model.block_options.{spec.name}"
    twice = sorted(set(own) & set(shared))
    if twice:
        raise ConfigError(
            "\n".join(f"{where}.{name}: set it as model.{name}; it is shared by all blocks" for name in twice)
        )
    try:
        return spec.config(**shared, **own)
    except ValidationError as error:
        options = [name for name in spec.config.model_fields if name not in shared]

        def prefix(loc: tuple[int | str, ...]) -> str:
            return where if loc and loc[0] not in shared else "model" if loc else f"model ({spec.name})"

        raise ConfigError("\n".join(problems_of(error, prefix, options))) from error
