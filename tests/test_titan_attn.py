"""The neural memory against Titans' recurrence taken token by token, and the block that gates attention with it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from ultrazoo.blocks.titan_attn import TitanAttention, TitanAttnConfig
from ultrazoo.config import ModelConfig
from ultrazoo.model import build_model
from ultrazoo.nn.neural_memory import NeuralMemory, memory_scan

Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, eta: Tensor, theta: Tensor, start: Tensor, chunk: int
) -> Tensor:
    """One document and head, token by token; the surprise is autograd's gradient of ||k M - v||^2."""
    memory, momentum, gradient_point = start, torch.zeros_like(start), start
    outputs = []
    for t in range(len(q)):
        if t % chunk == 0:
            gradient_point = memory
        point = gradient_point.detach().requires_grad_()
        with torch.enable_grad():
            surprise = torch.autograd.grad((k[t] @ point - v[t]).square().sum(), point)[0]
        momentum = eta[t] * momentum - theta[t] * surprise
        memory = keep[t] * memory + momentum
        outputs.append(q[t] @ memory)
    return torch.stack(outputs)


def draw(batch: int, length: int, heads: int = 2, width: int = 3, values: int = 4) -> tuple[Parts, Tensor]:
    torch.manual_seed(0)
    q, k = torch.randn(2, batch, length, heads, width).double()
    v = torch.randn(batch, length, heads, values).double()
    log_keep, log_eta = -torch.rand(2, batch, length, heads).double()
    theta = 0.3 * torch.rand(batch, length, heads).double()
    return (q, k, v, log_keep, log_eta, theta), torch.randn(1, heads, width, values).double()


def assert_documents_are_the_recurrence(
    parts: Parts, start: Tensor, y: Tensor, spans: Sequence[tuple[int, int, int]], chunk: int
) -> None:
    q, k, v, log_keep, log_eta, theta = parts
    for row, begin, end in spans:
        for head in range(q.shape[2]):
            own = [x[row, begin:end, head] for x in (q, k, v, log_keep.exp(), log_eta.exp(), theta)]
            expected = recurrence(*own, start[0, head], chunk)
            atol = 1e-11 * expected.abs().max().item()
            assert torch.allclose(y[row, begin:end, head], expected, rtol=0, atol=atol), (row, begin, end, head)


@pytest.mark.parametrize("chunk", [1, 4, 7, 32, 100])
def test_scan_is_the_recurrence(chunk: int) -> None:
    parts, start = draw(2, 45)
    y = memory_scan(*parts, start, chunk_size=chunk)
    assert_documents_are_the_recurrence(parts, start, y, [(0, 0, 45), (1, 0, 45)], chunk)


@pytest.mark.parametrize("chunk", [1, 4, 7, 32])
@pytest.mark.parametrize("gap", [0, 1])
def test_chunks_count_from_the_start_of_each_document(chunk: int, gap: int) -> None:
    parts, start = draw(3, 45)
    segments, spans = torch.zeros(3, 45, dtype=torch.int64), []
    for row, lengths in enumerate([(1, 9, 17, 14), (30, 2, 1, 1, 5), (3, 10, 3, 3, 5, 8)]):
        begin = row
        for number, length in enumerate(lengths):
            end = min(begin + length, 45)
            segments[row, begin:end] = number + 1
            spans.append((row, begin, end))
            begin = min(end + gap, 45)
    real = segments.ne(0)[..., None, None]
    q, k, v, *gates = parts
    parts = (q, k * real, v * real, *gates)
    y = memory_scan(*parts, start, segments=segments, chunk_size=chunk)
    assert_documents_are_the_recurrence(parts, start, y, [span for span in spans if span[1] < span[2]], chunk)


def test_a_half_step_without_momentum_stores_values_exactly() -> None:
    """M_t = M_{t-1} - theta u_t with theta = 1/2 and unit keys solves k_t M = v_t; orthogonal keys do not interfere."""
    keys = torch.linalg.qr(torch.randn(6, 6).double())[0].view(1, 6, 1, 6)
    values, zeros = torch.randn(1, 6, 1, 5).double(), torch.zeros(1, 6, 1).double()
    queries = keys[:, [0, 0, 1, 0, 2, 4]]  # each asks for what was written at or before its place
    y = memory_scan(
        queries, keys, values, zeros, zeros - 1e9, zeros + 0.5, torch.zeros(1, 1, 6, 5).double(), chunk_size=1
    )
    assert torch.allclose(y, values[:, [0, 0, 1, 0, 2, 4]], rtol=0, atol=1e-12)


def test_scan_has_the_gradients_of_differences() -> None:
    parts, start = draw(1, 11, heads=1, width=2, values=2)
    segments = torch.tensor([[4] * 7 + [2] * 4])

    def scan(*inputs: Tensor) -> Tensor:
        return memory_scan(*inputs[:6], inputs[6], segments=segments, chunk_size=3)  # type: ignore[call-arg]

    assert torch.autograd.gradcheck(scan, [x.requires_grad_() for x in (*parts, start)], fast_mode=True)


def test_the_second_direction_reads_the_row_backwards() -> None:
    torch.manual_seed(0)
    memory = NeuralMemory(8, 2, chunk_size=4, conv_kernel=3).double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
        mirrored = NeuralMemory(8, 2, chunk_size=4, conv_kernel=3).double()
        mirrored.load_state_dict(memory.state_dict())
        mirrored.conv.weight.copy_(memory.conv.weight.flip(2))
        mirrored.initial.copy_(memory.initial.flip(0))
        for name in ("weight", "bias"):
            value = getattr(memory.gates, name)
            getattr(mirrored.gates, name).copy_(value.unflatten(0, (2, -1)).flip(0).flatten(0, 1))
        x = torch.randn(2, 13, 8).double()
        assert torch.allclose(mirrored(x.flip(1)).flip(1), memory(x), rtol=0, atol=1e-12)


def test_memory_lasts_at_the_start_and_like_keys_do_not_overshoot() -> None:
    """1000 equal tokens in chunks of 32: the memory of their key settles at their value."""
    torch.manual_seed(0)
    memory = NeuralMemory(32, 2)
    alpha, eta, theta = torch.sigmoid(memory.gates.bias.detach()).view(2, 3, 2).unbind(1)
    assert ((1 - alpha) ** 128 > 0.7).all()
    assert (eta > 0.75).all()
    assert (theta == 0.5).all()
    with torch.no_grad():
        memory.conv.weight[..., ::2] = 0  # so that the two ends of the row do not differ
        y = memory(torch.randn(1, 1, 32).expand(1, 1000, 32).contiguous())
        middle = y[0, 400:600]
    assert (y.abs() <= 1.5 * middle.abs().max()).all()
    assert ((middle - middle.mean(0)).abs() <= 0.05 * middle.abs().max()).all()


def block(**options: object) -> TitanAttention:
    torch.manual_seed(0)
    titan = TitanAttention(TitanAttnConfig.model_validate({"hidden_size": 12, "num_heads": 3} | options))
    with torch.no_grad():
        for parameter in titan.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return titan.double().eval()


@pytest.mark.parametrize("persistent", [0, 3])
def test_attention_gated_by_the_memory(persistent: int) -> None:
    titan = block(position_embedding="none", persistent_tokens=persistent)
    x, segments = torch.randn(2, 9, 12).double(), torch.tensor([[1] * 5 + [2] * 4, [3] * 7 + [0] * 2])
    q, k, v = titan.projections.qkv(x).unflatten(2, (3, 3, 4)).unbind(2)
    tokens = torch.empty(0, 12).double() if titan.persistent is None else titan.persistent
    assert len(tokens) == persistent
    _, free_k, free_v = titan.projections.qkv(tokens).unflatten(1, (3, 3, 4)).unbind(1)
    memory = titan.memory(x, segments)
    gate = torch.sigmoid(torch.nn.functional.rms_norm(memory, (12,), titan.memory_norm.weight, 1e-5))
    for b, t in segments.nonzero().tolist():
        seen = segments[b].eq(segments[b, t])
        heads = []
        for h in range(3):
            keys, values = torch.cat((free_k[:, h], k[b, seen, h])), torch.cat((free_v[:, h], v[b, seen, h]))
            heads.append(torch.softmax(keys @ q[b, t, h] / 2, 0) @ values)
        attended = torch.nn.functional.rms_norm(torch.cat(heads), (12,), titan.attention_norm.weight, 1e-5)
        expected = titan.projections.output(attended * gate[b, t])
        assert torch.allclose(titan(x, segments)[b, t], expected, rtol=0, atol=1e-12)


def test_each_kind_of_position_gives_its_own_attention() -> None:
    x = torch.randn(1, 9, 12).double()
    kinds: list[dict[str, object]] = [
        {"position_embedding": "none"},
        {"position_embedding": "rope"},
        {"position_embedding": "rope", "use_hope": True},
        {"position_embedding": "none", "use_hope": True, "hope_damping": 0.3},
        {"position_embedding": "none", "use_hope": True, "hope_base": 10.0},
    ]
    attended = [block(**kind)._attend(x, None) for kind in kinds]
    for i, one in enumerate(attended):
        for other in attended[:i]:
            assert not torch.allclose(one, other, rtol=0, atol=1e-4)
    hope = [block(position_embedding=kind, use_hope=True)._attend(x, None) for kind in ("rope", "none")]
    assert torch.equal(*hope)  # HoPE stands in the place of rotary positions


def test_the_memory_takes_part() -> None:
    titan, x = block(), torch.randn(1, 9, 12).double()
    y = titan(x)
    with torch.no_grad():
        titan.memory.initial += 1
    assert not torch.allclose(titan(x), y, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("width", "heads", "persistent"), [(384, 6, 4), (768, 12, 0)])
def test_parameters_are_counted(width: int, heads: int, persistent: int) -> None:
    config = TitanAttnConfig(hidden_size=width, num_heads=heads, persistent_tokens=persistent)
    with torch.device("meta"):
        titan = TitanAttention(config)
    attention = 4 * (width * width + width) + persistent * width
    memory = 3 * width * width + 3 * 3 * width + 6 * heads * (width + 1) + 2 * width * width // heads
    assert sum(p.numel() for p in titan.parameters()) == attention + memory + 2 * width


def test_a_model_keeps_the_gates_biases() -> None:
    sizes = {"vocab_size": 20, "hidden_size": 12, "num_layers": 1, "num_heads": 3, "ffn_hidden_size": 12}
    model = build_model(ModelConfig.model_validate(sizes | {"layer_pattern": ["titan_attn"], "use_hope": True}))
    memory = model.layers[0].mixer.memory
    assert (memory.gates.bias.view(2, 3, 3)[:, 0] == -6).all()


def test_options_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValidationError, match="3 channels a head, expected an even number"):
        TitanAttnConfig(hidden_size=9, num_heads=3, position_embedding="none", use_hope=True)
    with pytest.raises(ValidationError, match="memory_chunk_size"):
        TitanAttnConfig(hidden_size=8, num_heads=2, memory_chunk_size=0)
