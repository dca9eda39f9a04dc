"""Every registered mixer keeps the laws; and each law catches a mixer that was built to break it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ultrazoo.nn.block_config import BlockConfig
from ultrazoo.nn.segments import checked
from ultrazoo.registry import registry
from ultrazoo.spec import BlockSpec
from ultrazoo.testing.half import half_precision
from ultrazoo.testing.law_kit import Subject
from ultrazoo.testing.laws import LAWS, LawViolation, run_laws

MIXERS = registry().mixers()
FAST_LAWS = [law for law in LAWS if law != "compile"]
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("titan_attn", {"use_hope": True}),
    ("titan_attn", {"position_embedding": "none", "persistent_tokens": 0, "memory_chunk_size": 5}),
    ("sigmoid_attn", {"qk_norm": True, "layer_scale": 1e-4, "normalize": True}),
    ("ode", {"ode_solver": "euler", "ode_steps": 1}),
]
# a step is traced like any other; tracing two takes twice as long
COMPILED: dict[str, dict[str, Any]] = {"ode": {"ode_steps": 1}, "titan_attn": {"use_hope": True}}
BITNET = sorted(name for name, spec in MIXERS.items() if "use_bitnet" in spec.config.model_fields)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", MIXERS)
def test_mixer_keeps_the_law(name: str, law: str) -> None:
    LAWS[law](MIXERS[name], COMPILED.get(name) if law == "compile" else None)


@pytest.mark.parametrize("law", FAST_LAWS)
@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_mixer_keeps_the_law_with_other_options(name: str, options: dict[str, Any], law: str) -> None:
    LAWS[law](MIXERS[name], options)


@pytest.mark.parametrize("law", [law for law in FAST_LAWS if law not in ("direction", "gradients", "inputs")])
@pytest.mark.parametrize("name", BITNET)
def test_mixer_keeps_the_law_in_bitnet(name: str, law: str) -> None:
    """All laws but the one of gradients, which a straight-through estimator breaks on purpose."""
    LAWS[law](MIXERS[name], {"use_bitnet": True})


class MeanConfig(BlockConfig):
    """Options of the mixers below."""

    hidden_size: int = Field(gt=0)
    dropout: float = 0.0


class Mean(nn.Module):
    """y_t = W (mean of the document) * tanh(x_t): keeps every law."""

    def __init__(self, config: MeanConfig) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.dropout)
        self.linear = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        ids = torch.ones_like(x[..., 0], dtype=torch.int64) if segments is None else self.documents(segments)
        seen = (ids.unsqueeze(1) == ids.unsqueeze(2)) & self.visible(x.shape[1])
        y = self.linear(seen.to(x.dtype) / seen.sum(2, keepdim=True).to(x.dtype) @ x) * torch.tanh(x)
        return self.dropout(y).masked_fill(ids.eq(0).unsqueeze(2), 0)

    def documents(self, segments: Tensor) -> Tensor:
        return checked(segments)

    def visible(self, length: int) -> Tensor:
        return torch.ones(length, length, dtype=torch.bool)


class Causal(Mean):
    def visible(self, length: int) -> Tensor:
        return super().visible(length).tril()


class IgnoresSegments(Mean):
    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        return super().forward(x, None)


class ReadsTheNextToken(Mean):
    """A convolution that takes the row for one document."""

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        y = super().forward(x, segments)
        return torch.where(y.eq(0), y, y + 1e-6 * F.pad(x, (0, 0, 0, 1))[:, 1:])


class ReadsAcross(Mean):
    """Masks padding and restarts nowhere: the error of a scan without resets."""

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        return super().forward(x, None if segments is None else segments.clamp(max=1))


class SplitsAtPadding(Mean):
    """Takes what comes after padding for another document: what kernels do that walk along runs of equal numbers."""

    def documents(self, segments: Tensor) -> Tensor:
        changes = F.pad(checked(segments).diff(dim=1).ne(0), (1, 0), value=True)
        return changes.cumsum(1).masked_fill(segments.eq(0), 0)


class JoinsWhatReturns(Mean):
    def documents(self, segments: Tensor) -> Tensor:
        return segments


class LeaksAtPadding(Mean):
    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        return super().forward(x, segments) + 1e-3 * self.linear.bias


class MixesRows(Mean):
    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        y = super().forward(x, segments)
        return y * (1 + 1e-6 * x[0].sum())


class WritesInput(Mean):
    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        y = super().forward(x * 1, segments)
        x.detach().mul_(1.0)
        return y


class Random(Mean):
    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        return super().forward(x, segments) * (1 + 1e-6 * torch.rand(()))


class DropsOutAlways(Mean):
    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        return F.dropout(super().forward(x, segments), self.dropout.p)


class WrongGradient(Mean):
    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        return super().forward(x.detach() + 0.99 * (x - x.detach()), segments)


class UnusedWeight(Mean):
    def __init__(self, config: MeanConfig) -> None:
        super().__init__(config)
        self.second = nn.Parameter(torch.ones(config.hidden_size))


class Forgets(Mean):
    def __init__(self, config: MeanConfig) -> None:
        super().__init__(config)
        self.register_buffer("gain", torch.rand(config.hidden_size), persistent=False)

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        return super().forward(x, segments) * self.gain


class BreaksGraph(Mean):
    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        return super().forward(x, segments) * (1.0 if x.sum().item() < 1e9 else 2.0)


class Overflows(Mean):
    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        y = super().forward(x, segments)
        return y * torch.rsqrt(1 + x.square().sum(2, keepdim=True)) * (x.pow(4) / (1 + x.pow(4)))


class SinglePrecision(Mean):
    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        return super().forward(x.float().to(x.dtype), segments)


def spec(module: type[nn.Module], bidirectional: bool = True) -> BlockSpec:
    return BlockSpec(
        name=module.__name__,
        kind="mixer",
        module=module,
        config=MeanConfig,
        paper="",
        equation="",
        bidirectional=bidirectional,
    )


def broken_laws(block: BlockSpec, laws: Iterable[str]) -> set[str]:
    return {result.law for result in run_laws(block, laws=laws) if not result.passed}


def test_a_sound_mixer_breaks_no_law() -> None:
    assert broken_laws(spec(Mean), LAWS) == set()
    assert broken_laws(spec(Causal, bidirectional=False), LAWS) == set()


@pytest.mark.parametrize(
    ("block", "laws"),
    [
        (spec(Causal), {"direction"}),
        (spec(Mean, bidirectional=False), {"direction"}),
        (spec(IgnoresSegments), {"padding", "packing", "gaps", "returning documents"}),
        (spec(ReadsTheNextToken), {"padding", "packing", "gaps"}),
        (spec(ReadsAcross), {"packing", "returning documents"}),
        (spec(SplitsAtPadding), {"gaps"}),
        (spec(JoinsWhatReturns), {"returning documents"}),
        (spec(LeaksAtPadding), {"padding", "packing", "gaps"}),
        (spec(MixesRows), {"padding", "packing", "batch order", "gaps"}),
        (spec(WritesInput), {"inputs"}),
        (spec(Random), {"padding", "packing", "batch order", "gradients", "state", "compile", "determinism", "gaps"}),
        (spec(DropsOutAlways), {"determinism"}),
        (spec(WrongGradient), {"gradients"}),
        (spec(UnusedWeight), {"gradients"}),
        (spec(Forgets), {"state"}),
        (spec(BreaksGraph), {"compile"}),
        (spec(Overflows), {"fp16"}),
        (spec(SinglePrecision), {"gradients"}),
    ],
    ids=lambda value: value.name if isinstance(value, BlockSpec) else "",
)
def test_a_broken_mixer_is_caught(block: BlockSpec, laws: set[str]) -> None:
    checked = LAWS if "compile" in laws else FAST_LAWS
    assert broken_laws(block, checked) == laws


def test_a_violation_has_the_numbers() -> None:
    with pytest.raises(
        LawViolation, match=r"WrongGradient: law \d+ \(gradients\) BROKEN: x: derivative .* limit 1e-05"
    ) as e:
        LAWS["gradients"](spec(WrongGradient))
    result = e.value.result
    assert (result.number, result.law, result.passed) == ([*LAWS].index("gradients") + 1, "gradients", False)
    assert result.measured == pytest.approx(0.01, rel=0.05)
    assert LAWS["gradients"](spec(Mean)).passed


class Steep(Mean):
    """Bends within the step of a finite difference, as a sharp softmax does."""

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        return torch.sin(2000 * super().forward(x, segments))


def test_a_steep_function_has_right_gradients() -> None:
    result = LAWS["gradients"](spec(Steep))
    assert result.passed and result.measured < 1e-6


class SteepAndWrong(Steep):
    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        return super().forward(x.detach() + 0.9999 * (x - x.detach()), segments)


def test_a_wrong_gradient_of_a_steep_function_is_caught() -> None:
    assert broken_laws(spec(SteepAndWrong), ["gradients"]) == {"gradients"}


class SwiGLU(Mean):
    """A gated product without a bound, as most feed-forwards have."""

    def __init__(self, config: MeanConfig) -> None:
        super().__init__(config)
        self.up = nn.Linear(config.hidden_size, 2 * config.hidden_size)

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        gate, value = self.up(x).chunk(2, dim=2)
        y = super().forward(x, segments)
        return y * 0 + (F.silu(gate) * value).masked_fill(y.eq(0), 0)


def test_a_gated_product_is_held_to_inputs_that_a_norm_gives() -> None:
    assert broken_laws(spec(SwiGLU), ["bf16", "fp16"]) == set()


def test_an_overflow_names_the_dtype_the_cure_and_the_place() -> None:
    (result,) = run_laws(spec(Overflows), laws=["fp16"])
    assert not result.passed and "fp16" in result.what and "ultrazoo.nn.saturate" in result.what
    line = Overflows.forward.__code__.co_firstlineno
    assert result.place == f"{__file__}:{line}" and str(result).endswith(result.place)


@pytest.mark.parametrize("name", MIXERS)
def test_a_built_in_mixer_stays_finite_in_fp16_at_inputs_of_a_thousand(name: str) -> None:
    checks = list(half_precision(Subject(MIXERS[name], {}), torch.float16, 1000.0))
    assert [check.what for check in checks if check.measured] == []


class RaisesDeepInside(Mean):
    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        return self.linear(x[..., 1:])


def test_an_error_names_the_line_that_led_to_it() -> None:
    (result,) = run_laws(spec(RaisesDeepInside), laws=["padding"])
    line = RaisesDeepInside.forward.__code__.co_firstlineno + 1
    assert result.place == f"{__file__}:{line}" and result.what.startswith("raised RuntimeError: mat1 and mat2")
