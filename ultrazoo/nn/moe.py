"""Mixture of experts: each token visits a few of several feed-forwards, none is dropped, padding visits none."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from ultrazoo.nn.bitlinear import NORM_EPS, autocast_dtype, int8_ste, ternary_shares, ternary_ste
from ultrazoo.nn.block_config import BlockConfig
from ultrazoo.nn.mlp import ACTIVATIONS, Activation
from ultrazoo.nn.tiles import ROW_TILE
from ultrazoo.spec import BlockSpec


class MoEConfig(BlockConfig):
    """Options of the mixture of experts, all shared with the model section."""

    hidden_size: int = Field(gt=0, description="Model width D.")
    ffn_hidden_size: int = Field(gt=0, description="Inner width F of each expert.")
    ffn_activation: Activation = Field(default="gelu", description="Activation between the two projections.")
    num_experts: int = Field(default=4, ge=1, description="Experts E.")
    top_k_experts: int = Field(default=2, ge=1, description="Experts that each token visits.")
    router_aux_loss_coef: float = Field(default=0.01, ge=0, description="The balance loss at perfect balance.")
    router_z_loss_coef: float = Field(default=0.001, ge=0, description="Weight of mean(logsumexp(router logits)^2).")
    use_bitnet: bool = Field(default=False, description="The experts' projections are ternary (b1.58).")
    initializer_range: float = Field(default=0.02, gt=0, description="Standard deviation of initial weights.")

    @model_validator(mode="after")
    def _check(self) -> MoEConfig:
        if self.top_k_experts > self.num_experts:
            raise ValueError(
                f"got top_k_experts {self.top_k_experts} with num_experts {self.num_experts}, expected at most as many "
                "as there are experts; lower top_k_experts or raise num_experts"
            )
        return self


@torch.library.custom_op("ultrazoo::grouped_matmul", mutates_args=())
def grouped_matmul(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """y_i = W_e x_i, where rows ends[e-1] to ends[e] of x belong to group e; rows after the last group give 0.

    One matrix product per group over contiguous rows. On a GPU each call waits until the sizes are on the host.

    Args:
        x: (M, D), sorted by group.
        weight: (E, F, D), of x's dtype.
        ends: (E,) int64, not decreasing, at most M.

    Returns:
        (M, F).
    """
    y = x.new_empty(x.shape[0], weight.shape[1])
    start = 0
    for matrix, end in zip(weight, ends.tolist(), strict=True):
        torch.mm(x[start:end], matrix.t(), out=y[start:end])
        start = end
    y[start:] = 0
    return y


@torch.library.custom_op("ultrazoo::grouped_outer", mutates_args=())
def grouped_outer(y: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """G_e = sum of y_i x_i^T over the rows of group e; 0 for a group without rows.

    Args:
        y: (M, F), sorted by group.
        x: (M, D), of y's dtype.
        ends: (E,) int64, not decreasing, at most M.

    Returns:
        (E, F, D).
    """
    out = x.new_empty(ends.shape[0], y.shape[1], x.shape[1])
    start = 0
    for matrix, end in zip(out, ends.tolist(), strict=True):
        torch.mm(y[start:end].t(), x[start:end], out=matrix)
        start = end
    return out


@grouped_matmul.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@grouped_outer.register_fake
def _(y: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], y.shape[1], x.shape[1])


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, ends = ctx.saved_tensors  # type: ignore[attr-defined]
    wants_x, wants_weight, _ = ctx.needs_input_grad  # type: ignore[attr-defined]
    grad_x = grouped_matmul(grad, weight.transpose(1, 2), ends) if wants_x else None
    grad_weight = grouped_outer(grad, x, ends) if wants_weight else None
    return grad_x, grad_weight, None


grouped_matmul.register_autograd(_backward, setup_context=_save)


@register_flop_formula([torch.ops.ultrazoo.grouped_matmul, torch.ops.ultrazoo.grouped_outer], get_raw=True)
def _flops(left: Tensor, right: Tensor, ends: Tensor, **kwargs: object) -> int:
    """A multiplication and an addition for each row of a group, and each element of its matrix."""
    inner = right.shape[1] * right.shape[2] if right.dim() == 3 else left.shape[1] * right.shape[1]
    return 2 * int(ends[-1]) * inner


def _places(slots: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Give each visit a row, those of an expert side by side in the order of the tokens.

    Args:
        slots: (V,) expert of each visit, ``num_experts`` for none; these come last.
        num_experts: E.

    Returns:
        The row of each visit (V,), and where the rows of each expert end (E,), multiples of ``ROW_TILE``.
    """
    visits = F.one_hot(slots, num_experts + 1)  # (V, E + 1)
    sizes = -(-visits.sum(0)[:num_experts] // ROW_TILE) * ROW_TILE
    ends = sizes.cumsum(0)
    rank = visits.cumsum(0).gather(1, slots.unsqueeze(1)).squeeze(1) - 1
    return F.pad(ends, (1, 0)).index_select(0, slots) + rank, ends


class MoE(nn.Module):
    """y = sum over the top k of p_e / (p_1 + .. + p_k) FFN_e(x), p = softmax(W_r x) in fp32 (arXiv 2101.03961).

    Top-k weights are renormalised (Mixtral, arXiv 2401.04088), but for k = 1 they are p_e itself (Switch): a weight
    that is always 1 would leave the router without a gradient from the task. Tokens are sorted by expert and each
    expert multiplies one contiguous block of rows, so no token is dropped (MegaBlocks, arXiv 2211.15841).

    With ``use_bitnet`` each expert's projections are BitLinear: an RMSNorm gain and a ternary scale per expert.

    Args:
        config: Widths, experts, coefficients.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.sum_counts: Callable[[Tensor], Tensor] | None = None
        """Sums counts of visits over the processes that share a batch: the balance loss is that of all of it."""
        E, D, F_ = config.num_experts, config.hidden_size, config.ffn_hidden_size
        self.router = nn.Linear(D, E, bias=False)
        nn.init.normal_(self.router.weight, std=config.initializer_range)
        self.up = nn.Parameter(torch.empty(E, F_, D).normal_(std=config.initializer_range))
        self.down = nn.Parameter(torch.empty(E, D, F_).normal_(std=config.initializer_range))
        self.up_bias = nn.Parameter(torch.zeros(E, F_))
        self.down_bias = nn.Parameter(torch.zeros(E, D))
        self.up_gain = nn.Parameter(torch.ones(E, D)) if config.use_bitnet else None
        self.down_gain = nn.Parameter(torch.ones(E, F_)) if config.use_bitnet else None
        for parameter in (self.up_bias, self.down_bias, self.up_gain, self.down_gain):
            if parameter is not None:
                parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(self, x: Tensor, segments: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Send each real token of x to its experts and return their weighted sum.

        Args:
            x: (B, L, D).
            segments: (B, L) document ids, 0 at padding, or None.

        Returns:
            (B, L, D), zero at padding, and the auxiliary values ``moe_balance_loss`` (``router_aux_loss_coef`` at
            perfect balance), ``moe_z_loss``, ``moe_load``: (E,), the share of all visits that each expert got, and
            ``moe_balance_factors``: (2, E), this share and a mean over the tokens, whose product summed over the
            experts is the balance loss.
        """
        k, E = self.config.top_k_experts, self.config.num_experts
        tokens = x.reshape(-1, x.shape[-1])  # (N, D)
        real = x.new_ones(tokens.shape[0], dtype=torch.bool) if segments is None else segments.reshape(-1).ne(0)
        weights, experts, aux = self._route(tokens, real)  # (N, k), (N, k)

        slots = experts.reshape(-1)  # (N k): expert of each visit, E at padding, which comes last
        places, ends = _places(slots, E)
        V, R = slots.shape[0], slots.shape[0] + E * (ROW_TILE - 1)
        visit = slots.new_full((R,), V).scatter(0, places, torch.arange(V, device=x.device))  # V: none
        owner = torch.bucketize(torch.arange(R, device=x.device), ends, right=True)
        member = owner.unsqueeze(1).eq(torch.arange(E, device=x.device))  # (R, E) one-hot, or all False

        rows = F.pad(tokens, (0, 0, 0, 1)).index_select(0, visit // k)  # (R, D), 0 where there is no visit
        rows = self._project(rows, self.up, self.up_bias, self.up_gain, member, ends)
        rows = ACTIVATIONS[self.config.ffn_activation](rows)
        rows = self._project(rows, self.down, self.down_bias, self.down_gain, member, ends)

        visits = rows.index_select(0, places).view(-1, k, x.shape[-1])  # (N, k, D)
        y = (visits * weights.to(visits.dtype).unsqueeze(-1)).sum(1)
        return y.view(x.shape), aux

    def statistics(self) -> dict[str, Tensor]:
        """Shares of the experts' ternary weights, with ``use_bitnet``: see ``ternary_shares``."""
        if not self.config.use_bitnet:
            return {}
        up, down = ternary_shares(self.up), ternary_shares(self.down)
        return {name: (up[name] + down[name]) / 2 for name in up}

    def _route(self, tokens: Tensor, real: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Choose experts and weights for tokens (N, D); padding gets weight 0 and expert E, which there is not."""
        k, E = self.config.top_k_experts, self.config.num_experts
        wide = torch.promote_types(tokens.dtype, torch.float32)
        with torch.autocast(tokens.device.type, enabled=False):
            logits = F.linear(tokens.to(wide), self.router.weight.to(wide))  # (N, E)
        padding = real.logical_not().unsqueeze(1)
        logits = logits.masked_fill(padding, 0)
        probs = logits.softmax(-1)
        top, experts = probs.topk(k, dim=-1)
        weights = (top / top.sum(-1, keepdim=True) if k > 1 else top).masked_fill(padding, 0)

        count = real.sum()
        visits = F.one_hot(experts, E).sum(1).masked_fill(padding, 0).sum(0)
        counts = torch.cat([visits, count.unsqueeze(0)])  # (E + 1,)
        if self.sum_counts is not None:
            counts = self.sum_counts(counts)
        load = counts[:E].to(wide) / (counts[E].clamp(min=1) * k)
        count = count.clamp(min=1)
        mean_prob = probs.masked_fill(padding, 0).sum(0) / count
        squared_z = logits.logsumexp(-1).square().masked_fill(padding.squeeze(1), 0)
        scale = self.config.router_aux_loss_coef * E
        aux = {
            "moe_balance_loss": scale * (load * mean_prob).sum(),
            "moe_balance_factors": torch.stack((load, scale * mean_prob)),
            "moe_z_loss": self.config.router_z_loss_coef * squared_z.sum() / count,
            "moe_load": load,
        }
        return weights, experts.masked_fill(padding, E), aux

    def _project(
        self, rows: Tensor, weight: Tensor, bias: Tensor, gain: Tensor | None, member: Tensor, ends: Tensor
    ) -> Tensor:
        """Apply each expert's linear layer to its rows; rows of padding come out 0."""
        dtype = autocast_dtype(rows)
        if gain is not None:
            wide = torch.promote_types(rows.dtype, gain.dtype)
            gains = member.to(wide) @ gain.to(wide)  # (N k, width): a matrix product, so that its gradient is one too
            rows = int8_ste(F.rms_norm(rows.to(wide), rows.shape[-1:], None, NORM_EPS) * gains)
            weight = ternary_ste(weight)
        y = grouped_matmul(rows.to(dtype), weight.to(dtype), ends)
        return torch.addmm(y, member.to(dtype), bias.to(dtype))


SPEC = BlockSpec(
    name="moe",
    kind="ffn",
    module=MoE,
    config=MoEConfig,
    paper="arXiv 2101.03961",
    equation="y = sum over the top k of p_e / (p_1 + .. + p_k) FFN_e(x), p = softmax(W_r x)",
    state_size=lambda config: 0,
)
