"""With ``exact_balance_loss`` micro-batches have the gradient of the whole step, mixture of experts included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from train_parts import VOCAB, Rows, rows

from ultrazoo.config import ModelConfig
from ultrazoo.model import MaskedLM, build_model
from ultrazoo.train.amp import Precision
from ultrazoo.train.objective import accumulate

CPU = torch.device("cpu")
PARTS = [(0, 2), (2, 2), (4, 2), (6, 2)]
MODEL = {"vocab_size": VOCAB, "hidden_size": 16, "num_layers": 3, "num_loops": 2, "num_heads": 2, "ffn_hidden_size": 16}
MODEL |= {"layer_pattern": ["standard_attn"], "use_moe": True, "num_experts": 4, "router_aux_loss_coef": 1.0}


def make_model(dtype: torch.dtype = torch.float64, **changes: Any) -> MaskedLM:
    torch.manual_seed(3)
    model = build_model(ModelConfig.model_validate({**MODEL, "dropout": 0.0, **changes}))
    with torch.no_grad():
        for layer in model.layers:
            layer.ffn.router.weight.mul_(20)  # so that experts get different shares
    return model.to(dtype)


def gradients(model: MaskedLM, parts: list[Rows], **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The scalars of a step and its gradients, with dropout drawn from the same seed each time."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(11)
    sums, _ = accumulate(model, parts, Precision(CPU, None), **options)  # type: ignore[arg-type]
    return sums, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest difference of a gradient, relative to its largest value."""
    assert one.keys() == other.keys()
    assert len(one) > 20
    return max(((one[n] - other[n]).abs().max() / other[n].abs().max().clamp(min=1e-30)).item() for n in other)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("recompute", [False, True])
def test_four_times_two_rows_are_eight_rows(dtype: torch.dtype, limit: float, recompute: bool) -> None:
    model = make_model(dtype)
    model.recompute_layers(recompute)
    parts = [rows(*part) for part in PARTS]
    assert len({part.num_tokens for part in parts}) > 1, "padding must differ for this test to tell"
    whole_sums, whole = gradients(model, [rows(0, 8)])
    sums, found = gradients(model, parts, exact_balance=True)
    assert difference(found, whole) < limit
    for name, value in whole_sums.items():
        torch.testing.assert_close(sums[name], value, rtol=limit, atol=0, msg=name)
    _, separate = gradients(model, parts)
    routers = {name for name in whole if "router" in name}
    assert len(routers) == 3
    assert max(((separate[n] - whole[n]).norm() / whole[n].norm()).item() for n in routers) > 1e-3


def test_with_dropout_it_is_the_objective_of_the_whole_step_and_the_same_draws() -> None:
    model = make_model(dropout=0.3)
    parts = [rows(*part) for part in PARTS]
    targets = sum(int((part.labels != -100).sum()) for part in parts)
    tokens = sum(part.num_tokens for part in parts)
    torch.manual_seed(11)
    outputs = [model(part.input_ids, part.segments, part.labels) for part in parts]
    shares = [part.num_tokens / tokens for part in parts]
    load, probability = (
        sum(share * output.factors["moe_balance_loss"][:, row] for share, output in zip(shares, outputs, strict=True))
        for row in (0, 1)
    )
    objective = sum(output.loss_sum for output in outputs) / targets + (load * probability).sum(1).mean()
    objective = objective + sum(s * output.losses["moe_z_loss"] for s, output in zip(shares, outputs, strict=True))
    after = torch.get_rng_state()
    names, parameters = zip(*model.named_parameters(), strict=True)
    expected = dict(zip(names, torch.autograd.grad(objective, parameters), strict=True))
    sums, found = gradients(model, parts, exact_balance=True)
    assert difference(found, expected) < 1e-12
    torch.testing.assert_close(sums["objective"], objective.detach(), rtol=1e-12, atol=0)
    assert torch.equal(torch.get_rng_state(), after)


def test_without_experts_or_accumulation_nothing_is_run_twice() -> None:
    dense, experts = make_model_without_experts(), make_model(dropout=0.3)
    for model, parts in ((dense, [rows(0, 2), rows(2, 2)]), (experts, [rows(0, 4)])):
        calls: list[bool] = []
        handle = model.register_forward_hook(lambda *_, calls=calls: calls.append(torch.is_grad_enabled()))
        _, plain = gradients(model, parts)
        _, exact = gradients(model, parts, exact_balance=True)
        handle.remove()
        assert calls == [True] * 2 * len(parts)
        assert all(torch.equal(exact[name], value) for name, value in plain.items())


def make_model_without_experts() -> MaskedLM:
    torch.manual_seed(3)
    return build_model(ModelConfig.model_validate({**MODEL, "use_moe": False, "router_aux_loss_coef": 0.01}))
