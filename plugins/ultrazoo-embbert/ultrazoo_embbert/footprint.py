"""The paper's account of memory: the encoder's parameters, and the activations of its largest step."""

from __future__ import annotations

from torch import nn


def encoder_parameters(model: nn.Module) -> int:
    """Count the parameters of a masked language model without those of its head."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("head."))


def inference_bytes(parameters: int, hidden_size: int, length: int, bytes_per_number: int = 4) -> int:
    """Bytes to run one sequence: P + 2 D L + L^2 numbers: weights, two vectors a token, and the attention weights.

    Args:
        parameters: P, of the encoder.
        hidden_size: D.
        length: L, in tokens.
        bytes_per_number: 4 for fp32.
    """
    return bytes_per_number * (parameters + 2 * hidden_size * length + length**2)
