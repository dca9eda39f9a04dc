"""``training.compile``: the layers of the model through torch.compile."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

import ultrazoo
from ultrazoo.config import Config
from ultrazoo.errors import ConfigError
from ultrazoo.model import MaskedLM
from ultrazoo.train.receipt import kernels_used
from ultrazoo.train.team import Team

OPS = Path(ultrazoo.__file__).with_name("ops")


def compile_layers(model: MaskedLM, config: Config, device: torch.device, team: Team) -> None:
    """Have each layer compiled at its first call; embeddings and head, whose shapes change, stay as they are.

    torch keeps what it compiled on disk and does not notice that an operator's formula for gradients has changed, so
    the key of that cache is told the version, the sources of the operators and what they run on.

    Args:
        model: The model, on its device.
        config: The whole configuration.
        device: Where it trains.
        team: The processes that train.

    Raises:
        ConfigError: There are many processes, or no C++ compiler.
    """
    if team.size > 1:
        raise ConfigError(f"training.compile: got true with {team.size} processes; expected one; set it to false")
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except RuntimeError as error:
            raise ConfigError(
                "training.compile: got true, but torch.compile needs a C++ compiler on the CPU and found none; install "
                "g++ or clang, or set it to false"
            ) from error
    kernels = kernels_used(config, device)  # loads them: a compiled layer would not
    digest = hashlib.sha256(repr(kernels).encode())
    for path in sorted(OPS.rglob("*.py")):
        digest.update(path.read_bytes())
    torch.compiler.config.cache_key_tag = f"ultrazoo {ultrazoo.__version__} {digest.hexdigest()[:16]}"
    for layer in model.layers:
        layer.compile(dynamic=False)
