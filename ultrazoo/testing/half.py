"""Whether a block stays finite in half precision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ultrazoo.testing.law_kit import Check, Subject, finite, packed_rows

BF16_SCALES = (1.0, 30.0, 1000.0)
FP16_SCALES = (1.0, 30.0)
"""A norm of D channels gives at most D^0.5 in one of them: 28 at D = 768. fp16 ends at 65,504, bf16 where fp32 does."""
SATURATE = "; fp16 ends at 65,504: bring products back below with ultrazoo.nn.saturate"


def half_precision(subject: Subject, dtype: torch.dtype, scale: float) -> Iterator[Check]:
    """Count the outputs and gradients of a block that are not finite in a half dtype.

    Args:
        subject: The block.
        dtype: fp16 or bf16.
        scale: Size of the inputs.
    """
    segments, _ = packed_rows()
    name = "bf16" if dtype == torch.bfloat16 else "fp16"

    def counted(what: str, x: Tensor) -> Check:
        check = finite(f"{what}, inputs of size {scale:g}", x)
        return replace(check, what=check.what + SATURATE) if check.measured and name == "fp16" else check

    block, x = subject.build(torch.float32), scale * subject.input(*segments.shape, dtype=torch.float32)
    x.requires_grad_()
    with torch.autocast("cpu", dtype):
        y = block(x, segments)
    yield counted(f"output under {name} autocast", y)
    # the mean keeps the loss itself, and so the scale of the gradient, within the dtype
    y.float().mean().backward()
    for key, value in (("x", x), *block.named_parameters()):
        if value.grad is not None:
            yield counted(f"gradient of {key} under {name} autocast", value.grad)
    y = block.to(dtype)(x.detach().to(dtype), segments)
    yield counted(f"output in {name} weights", y)
