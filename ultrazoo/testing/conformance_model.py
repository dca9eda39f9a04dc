"""Checks of whole small models with a block in its place: saving, packing, compiling, half precision, repeating."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ultrazoo.config import ModelConfig, model_around
from ultrazoo.errors import ConfigError
from ultrazoo.model import IGNORED, MaskedLM, build_model
from ultrazoo.spec import BlockSpec
from ultrazoo.testing.conformance_result import Finding, bounded
from ultrazoo.testing.law_kit import ROUNDING, packed_rows, with_gaps

SPECIAL = 5
"""Ids of special tokens; bytes come after them."""
VOCABULARY = SPECIAL + 256
WIDTHS = (32, 64, 128, 256)
"""A model is built at the first of these widths that its block accepts."""
REFUSALS = (ConfigError, ValueError, RuntimeError)
"""What a block raises that does not accept a width; pydantic's error is a ValueError."""
Built = TypeVar("Built")


def small_config(spec: BlockSpec, width: int, **changes: Any) -> ModelConfig:
    """Return a model section of two layers and two heads of a width that uses the block."""
    size = {"vocab_size": VOCABULARY, "num_layers": 2, "ffn_hidden_size": 2 * width}
    return model_around(spec, width, head_width=width // 2, factorized_embedding_dim=width // 2, **{**size, **changes})


def model_of(spec: BlockSpec, *, seed: int = 0, **changes: Any) -> MaskedLM:
    """Build a small model with the block.

    Args:
        spec: The block.
        seed: Of the initial weights.
        changes: Fields of the model section that differ.

    Raises:
        ConfigError: The block accepts none of the widths.
        ValueError: Likewise.
    """

    def build(width: int) -> MaskedLM:
        config = small_config(spec, width, **changes)
        torch.manual_seed(seed)
        return build_model(config)

    return first_accepted(WIDTHS, build)


def first_accepted(widths: Sequence[int], build: Callable[[int], Built]) -> Built:
    """Build at the first width that is not refused; the refusal of the last one is raised."""
    for width in widths[:-1]:
        with contextlib.suppress(*REFUSALS):
            return build(width)
    return build(widths[-1])


def parameters_of(spec: BlockSpec, model: MaskedLM) -> dict[str, nn.Parameter]:
    """Return the weights that belong to the block's modules in a model, by their full names."""
    if spec.kind == "embedding":
        modules = [("embeddings", model.embeddings)]
    elif spec.kind == "norm":  # those of the model, and not what a block calls its own
        modules = [
            (n, m) for n, m in model.named_modules() if n.endswith("norm") and not {"mixer", "ffn"} & {*n.split(".")}
        ]
    else:
        modules = [(f"layers.{i}.{spec.kind}", getattr(layer, spec.kind)) for i, layer in enumerate(model.layers)]
    return {f"{name}.{key}": value for name, module in modules for key, value in module.named_parameters()}


def state_round_trip(spec: BlockSpec) -> Finding:
    """A differently drawn model that loads the saved file gives the same bits, and the file has every tensor."""
    model, other = (_scrambled(model_of(spec, seed=seed), seed) for seed in (0, 9))
    ids, segments = _rows()
    with torch.no_grad():
        _warm(model)
        want = model(ids, segments).logits
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file(tensors, path)
        other.load_state_dict(load_file(path))
    with torch.no_grad():
        got = other(ids, segments).logits
    what = f"share of logits that differ after {len(tensors)} tensors were saved and loaded"
    return bounded(what, got.ne(want).double().mean().item(), 0.0)


def packing(spec: BlockSpec) -> Finding:
    """Documents packed in a row of a whole model, with padding between and inside them, give what each gives alone."""
    model = _scrambled(model_of(spec), 0).double()
    segments, spans = packed_rows()
    ids = _ids(*segments.shape)
    worst, where = 0.0, ""
    with torch.no_grad():
        for marks, gaps in ((segments, ""), (with_gaps(segments), " with padding inside")):
            packed = model.encode(ids.masked_fill(marks.eq(0), 0), marks)
            for row, start, stop in spans:
                keep = start + marks[row, start:stop].nonzero().squeeze(1)
                if not keep.numel():
                    continue
                apart = model.encode(ids[row : row + 1, keep])
                error = ((packed[row : row + 1, keep] - apart).abs().max() / apart.abs().max()).item()
                if not error <= worst:
                    worst, where = error, f", worst in {stop - start} tokens{gaps} at {start} of row {row}"
    return bounded(f"{len(spans)} documents packed against apart: relative difference{where}", worst, ROUNDING)


def compiled(spec: BlockSpec) -> Finding:
    """``torch.compile(fullgraph=True)`` of a whole encoder trains as eager does."""
    model = _scrambled(model_of(spec, num_layers=1), 0).double().train()
    ids, segments = _rows()
    torch.compiler.reset()
    fast = torch.compile(model.encode, fullgraph=True, backend="aot_eager")
    found = []
    for encode in (model.encode, fast):
        hidden = encode(ids, segments)
        table = model.embeddings.get_parameter("tokens.weight")
        found.append((hidden.detach(), torch.autograd.grad(hidden.square().sum(), table)[0]))
    torch.compiler.reset()
    (want, want_grad), (got, got_grad) = found
    error = max(_apart(got, want), _apart(got_grad, want_grad))
    return bounded("hidden states and gradient of the table, compiled against eager", error, ROUNDING)


def half_precision(spec: BlockSpec) -> Finding:
    """Loss and gradients are finite under bf16 and fp16 autocast, and the logits with weights in those dtypes."""
    bad, total = 0, 0
    ids, segments = _rows()
    labels = ids.masked_fill(segments.eq(0), IGNORED)
    first = ""
    for dtype in (torch.float16, torch.bfloat16):
        model = model_of(spec).train()
        with torch.autocast("cpu", dtype):
            output = model(ids, segments, labels)
        (output.loss_sum / output.num_targets + sum(output.losses.values())).backward()
        values = {"loss": output.loss_sum, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}
        with torch.no_grad():
            values["logits in its weights"] = model.eval().to(dtype)(ids, segments).logits
        for name, value in values.items():
            count = int(value.isfinite().logical_not().sum())
            first = first or (f", first in {name} of {dtype}" if count else "")
            bad, total = bad + count, total + value.numel()
    return bounded(f"numbers that are not finite, of {total:,}{first}", float(bad), 0.0)


def repeatable(spec: BlockSpec) -> Finding:
    """Two models of one seed give the same loss and gradients to the last bit, dropout included."""
    ids, segments = _rows()
    labels = ids.masked_fill(segments.eq(0), IGNORED)
    runs = []
    for _ in range(2):
        model = model_of(spec, dropout=0.2).train()
        torch.manual_seed(3)
        output = model(ids, segments, labels)
        output.loss_sum.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        runs.append({"loss": output.loss_sum.detach(), **gradients})
    worst = [name for name, value in runs[0].items() if not torch.equal(value, runs[1][name])]
    named = f": {', '.join(worst[:3])}" if worst else ""
    return bounded(f"of {len(runs[0])} tensors, those that differ between two runs{named}", float(len(worst)), 0.0)


def _scrambled(model: MaskedLM, seed: int) -> MaskedLM:
    """Move every weight off its initial value, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def _warm(model: MaskedLM) -> None:
    """One step in train mode, so that statistics that a block keeps are not those it began with."""
    ids, segments = _rows()
    model.train()
    model(ids, segments)
    model.eval()


def _rows() -> tuple[Tensor, Tensor]:
    """Ids and segments (2, L) with documents of several lengths and padding."""
    segments, _ = packed_rows()
    segments = segments[:2, 5:45].contiguous()
    return torch.where(segments.eq(0), 0, _ids(*segments.shape)), segments


def _ids(rows: int, length: int) -> Tensor:
    return torch.randint(SPECIAL, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def _apart(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()
