"""A plugin of one sound mixer and of blocks with one fault each; tests import it, or install its text."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ultrazoo import hookimpl
from ultrazoo.nn.block_config import BlockConfig
from ultrazoo.nn.segments import checked
from ultrazoo.ops import kernel_policy, retention
from ultrazoo.spec import BlockSpec

ULTRAZOO_PLUGIN_API = 1


class Config(BlockConfig):
    hidden_size: int
    dropout: float = 0.0


class Sound(nn.Module):
    """y_t = W (mean of the document) tanh(x_t)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.dropout)
        self.linear = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        ids = torch.ones_like(x[..., 0], dtype=torch.int64) if segments is None else checked(segments)
        seen = ids.unsqueeze(1) == ids.unsqueeze(2)
        mean = seen.to(x.dtype) / seen.sum(2, keepdim=True).to(x.dtype) @ x
        return self.dropout(self.linear(mean) * torch.tanh(x)).masked_fill(ids.eq(0).unsqueeze(2), 0)


class Leaks(Sound):
    """Reads the documents before its own."""

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        return super().forward(x, None if segments is None else checked(segments).clamp(max=1))


class Pads(Sound):
    """Its bias stands at padding."""

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        return super().forward(x, segments) + 1e-3 * self.linear.bias


class Mutates(Sound):
    """Scales its input in place."""

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        y = super().forward(x * 1, segments)
        x.detach().mul_(1.0)
        return y


class Random(Sound):
    """Adds noise in eval mode too."""

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        return super().forward(x, segments) * (1 + 1e-3 * torch.rand(()))


class Narrow(Sound):
    """Has no kernel for fp16."""

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        y = super().forward(x, segments)
        if torch.float16 in (y.dtype, self.linear(x).dtype):
            raise NotImplementedError("'mean' not implemented for 'Half'")
        return y


class Untrained(Sound):
    """Cuts the gradient of its weights and of its input."""

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        return super().forward(x, segments).detach()


class Forgets(Sound):
    """Keeps a random number out of its state."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.register_buffer("gain", torch.rand(config.hidden_size), persistent=False)

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        return super().forward(x, segments) * self.gain


class Retains(Sound):
    """Calls its op."""

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        heads = x.tanh().unsqueeze(2)  # (B, L, 1, D)
        decay = x.new_full((1,), -0.5, dtype=torch.float32)
        return super().forward(x, segments) + retention(heads, heads, heads, decay, segments=segments).flatten(2)


class Slow(Retains):
    """Calls the reference where there is a kernel."""

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        with kernel_policy("reference"):
            return super().forward(x, segments)


class Raises(Sound):
    """Is not finished."""

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        raise KeyError("scan")


class Logs(nn.Module):
    """A feed-forward whose loss is not a scalar and whose statistic counts padding."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.linear = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, segments: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        return self.linear(x).tanh(), {"row_loss": x.mean((1, 2)), "mean": x.detach().mean()}


class Batch(nn.Module):
    """A norm over all the tokens of a batch."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / x.square().mean().add(1e-5).sqrt()


def _spec(module: type[nn.Module], kind: str = "mixer", ops: tuple[str, ...] = ()) -> BlockSpec:
    name = module.__name__.lower()
    return BlockSpec(name=name, kind=kind, module=module, config=Config, paper="none", equation="y = f(x)", ops=ops)  # type: ignore[arg-type]


MIXERS = (Sound, Leaks, Pads, Mutates, Random, Narrow, Untrained, Forgets, Raises)
SPECS = [
    *(_spec(module) for module in MIXERS),
    BlockSpec(
        name="idle",
        kind="mixer",
        module=Sound,
        config=Config,
        paper="none",
        equation="y = f(x)",
        ops=("ultrazoo::retention",),
    ),
    _spec(Retains, ops=("ultrazoo::retention",)),
    _spec(Slow, ops=("ultrazoo::retention",)),
    _spec(Logs, "ffn"),
    _spec(Batch, "norm"),
]


@hookimpl
def ultrazoo_blocks() -> list[BlockSpec]:
    return SPECS
