"""What is not finite is followed back to the module and operator where it arose, forwards and backwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from train_parts import LENGTH, rows

from ultrazoo.config import ModelConfig
from ultrazoo.model import MaskedLMOutput, build_model
from ultrazoo.ops import retention
from ultrazoo.train.amp import Precision
from ultrazoo.train.examine import WEIGHTS, Examination, examine

CPU = torch.device("cpu")


class Piece(nn.Module):
    """A model whose loss is a function of a parameter."""

    def __init__(self, function: Any, start: torch.Tensor) -> None:
        super().__init__()
        self.piece = nn.Module()
        self.piece.register_parameter("x", nn.Parameter(start))
        self.piece.forward = lambda: function(self.piece.x)

    def forward(self, input_ids: torch.Tensor, segments: Any, labels: Any) -> MaskedLMOutput:
        loss = self.piece()
        return MaskedLMOutput(loss, loss, loss, 1)


def look(function: Any, start: torch.Tensor) -> Examination:
    return examine(Piece(function, start), [rows(0, 2)], Precision(CPU, None))  # type: ignore[list-item]


def test_a_gradient_alone_is_followed_into_the_backward_pass() -> None:
    seen = look(lambda x: x.sqrt().sum(), torch.tensor([4.0, 0.0, 1.0]))
    assert seen.loss > 0
    assert seen.origin is not None
    assert (seen.origin.direction, seen.origin.op, seen.origin.inf) == ("backward", "aten::div", 1)


def test_the_first_nan_is_told_from_the_infinity_before_it() -> None:
    seen = look(lambda x: (x.exp() / x.exp()).sum(), torch.tensor([1.0, 1000.0]))
    assert seen.origin is not None
    assert seen.overflow is not None
    assert (seen.origin.op, seen.origin.nan) == ("aten::div", 1)
    assert (seen.overflow.op, seen.overflow.largest_input) == ("aten::exp", 1000.0)


def test_infinities_that_do_no_harm_are_not_named() -> None:
    def masked(x: torch.Tensor) -> torch.Tensor:
        scores = x.masked_fill(torch.tensor([True, False, False]), -torch.inf)
        return scores.softmax(0).square().sum()

    seen = look(masked, torch.tensor([1.0, 2.0, 3.0]))
    assert seen.finite
    assert seen.origin is None
    harmful = look(lambda x: x.masked_fill(x > 0, -torch.inf).softmax(0).sum(), torch.ones(3))
    assert harmful.origin is not None
    assert harmful.origin.op == "aten::_softmax"


def test_weights_that_are_bad_to_begin_with_are_named() -> None:
    seen = look(lambda x: (x * 2).sum(), torch.tensor([1.0, torch.nan]))
    assert seen.origin is not None
    assert (seen.origin.module, seen.origin.op) == ("piece.x", WEIGHTS)


def test_an_op_of_the_library_is_named_as_itself() -> None:
    def mix(x: torch.Tensor) -> torch.Tensor:
        q = x.expand(1, LENGTH, 1, 2)
        return (retention(q, q, q, torch.tensor([-0.1])) * 0).sum()

    seen = look(mix, torch.full((1, LENGTH, 1, 2), 1e25))
    assert seen.origin is not None
    assert seen.overflow is not None
    assert seen.overflow.op == "ultrazoo::retention"
    assert seen.origin.op == "aten::mul"


def test_an_overflow_is_followed_through_rotary_positions() -> None:
    names = {"layer_pattern": ["standard_attn"], "num_layers": 2, "hidden_size": 32, "num_heads": 2, "dropout": 0.0}
    model = build_model(ModelConfig.model_validate({**names, "vocab_size": 64, "ffn_hidden_size": 32}))
    with torch.no_grad():
        model.get_parameter("layers.1.mixer.projections.qkv.weight")[0] = 3e38
    seen = examine(model, [rows(0, 2)], Precision(CPU, None))  # type: ignore[list-item]
    assert seen.overflow is not None
    assert (seen.overflow.module, seen.overflow.op) == ("layers.1.mixer.projections.qkv", "aten::addmm")


def test_memory_that_is_used_again_is_not_taken_for_what_it_held() -> None:
    def reuse(x: torch.Tensor) -> torch.Tensor:
        for _ in range(20):
            bad = (x.detach() / 0).sum()  # freed at once
            del bad
            x = x + 1
        return x.log().sum()

    seen = look(reuse, torch.tensor([1.0, 2.0]))
    assert seen.finite
    assert seen.origin is None
