"""The encoder around a mixer: the same parts for every mixer, and the same number of parameters."""

from __future__ import annotations

import torch

from ultrazoo.config import ModelConfig, model_around
from ultrazoo.errors import ConfigError
from ultrazoo.model import build_model
from ultrazoo.registry import registry
from ultrazoo.spec import BlockSpec

YARDSTICK = "standard_attn"
HEAD_WIDTH = 32
CONV_TAPS = 3
TOLERANCE = 0.02
"""Largest difference in parameters from the budget, as a share of it."""


def encoder_config(mixer: BlockSpec, vocab_size: int, width: int, ffn: int, layers: int) -> ModelConfig:
    """Return the model: pre norm, no dropout, and an embedding that mixes a token with its two neighbours.

    The convolution binds a key to the value beside it for every mixer alike, so that the tasks test the memory and not
    who sees a neighbour best. Initial weights have a standard deviation that suits narrow models.

    Args:
        mixer: The block.
        vocab_size: Ids of the task.
        width: D.
        ffn: Inner width of the feed-forward.
        layers: How many.

    Raises:
        ConfigError: The block refuses the width.
    """
    return model_around(
        mixer,
        width,
        head_width=HEAD_WIDTH,
        vocab_size=vocab_size,
        num_layers=layers,
        ffn_hidden_size=ffn,
        initializer_range=width**-0.5,
        use_factorized_embedding=True,
        factorized_embedding_dim=max(1, width // 2),
        use_embedding_conv=True,
        embedding_conv_kernel=CONV_TAPS,
    )


def count_parameters(config: ModelConfig) -> int:
    """Return the number of parameters of a model, each counted once; torch's random stream stays where it was."""
    with torch.random.fork_rng(devices=[]):
        return sum(parameter.numel() for parameter in build_model(config).parameters())


def fit(spec: BlockSpec, vocab_size: int, size: int, layers: int) -> tuple[ModelConfig, int]:
    """Return the encoder around a mixer at the budget, and its parameters.

    The budget is that of standard attention of width ``size`` and a feed-forward of four times that. The feed-forward
    of another mixer is made as much narrower or wider as its own parameters ask for; where that would leave it narrower
    than the model, the model is narrowed first, eight channels at a time.

    Args:
        spec: The mixer.
        vocab_size: Ids of the task.
        size: D.
        layers: How many.

    Raises:
        ConfigError: The block refuses the width, or even half the width has too many parameters.
    """
    yardstick = registry().block("mixer", YARDSTICK)
    budget = count_parameters(encoder_config(yardstick, vocab_size, size, 4 * size, layers))
    smallest = 0
    for width in range(size, size // 2 - 1, -8):
        least, more = (
            count_parameters(encoder_config(spec, vocab_size, width, ffn, layers)) for ffn in (width, width + 1)
        )
        ffn = width + round((budget - least) / (more - least))
        if ffn >= width:
            config = encoder_config(spec, vocab_size, width, ffn, layers)
            count = least + (ffn - width) * (more - least)
            if abs(count - budget) <= TOLERANCE * budget:
                return config, count
        smallest = least
    raise ConfigError(
        f"{spec.name}: got {smallest:,} parameters at {width} channels with the narrowest feed-forward, expected "
        f"{budget:,} as with {YARDSTICK} of width {size}, within {TOLERANCE:.0%}; choose another --size"
    )
