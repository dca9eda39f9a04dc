"""Mixed precision: bfloat16 where the device has it, float16 with a scaled loss on GPUs that do not."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from ultrazoo.errors import NonFiniteError

SMALLEST_SCALE = 1.0


class Precision:
    """The dtype that matrix products run in, and the scaler that float16 needs."""

    def __init__(self, device: torch.device, dtype: torch.dtype | None) -> None:
        self.device = device
        self.dtype = dtype
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    @property
    def scaled(self) -> bool:
        """True when gradients overflow as a matter of course and the scaler skips those steps."""
        return self.scaler.is_enabled()

    def autocast(self) -> AbstractContextManager[Any]:
        """Context of the forward pass."""
        return torch.autocast(self.device.type, dtype=self.dtype or torch.bfloat16, enabled=self.dtype is not None)

    def backward(self, objective: torch.Tensor) -> None:
        """Accumulate the gradients of the objective, scaled where the dtype needs it."""
        self.scaler.scale(objective).backward()

    def check_scale(self, step: int) -> None:
        """Stop a run whose float16 gradients overflow at every scale.

        Raises:
            NonFiniteError: The scale fell below 1.
        """
        if self.scaled and self.scaler.get_scale() < SMALLEST_SCALE:
            raise NonFiniteError(
                f"step {step}: float16 gradients overflow even at a loss scale of {self.scaler.get_scale():g}; "
                "lower training.learning_rate, or set training.use_amp to false"
            )

    def state_dict(self) -> dict[str, Any]:
        """JSON values of the scaler."""
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the scaler, if this run and the saved one both have one."""
        if self.scaled and state:
            self.scaler.load_state_dict(state)


def make_precision(device: torch.device, use_amp: bool) -> Precision:
    """Choose float32, bfloat16 or (CUDA without bfloat16) float16."""
    if not use_amp:
        return Precision(device, None)
    lacks_bfloat16 = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return Precision(device, torch.float16 if lacks_bfloat16 else torch.bfloat16)
