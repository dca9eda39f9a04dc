"""The rule of ``segments``: a document is one run of tokens, and padding inside it changes nothing at its tokens.

Every op, helper and block, and a whole model, on rows with padding inside documents, against the same rows with the
padding cut out; and on rows in which a document returns, which every one of them refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from ultrazoo.config import ModelConfig
from ultrazoo.model import IGNORED, build_model
from ultrazoo.nn.attention import attention_mask
from ultrazoo.nn.conv import SegmentConv1d
from ultrazoo.nn.neural_memory import memory_scan
from ultrazoo.nn.segments import Gaps, checked, positions, same_document, starts
from ultrazoo.ops import attention, kernel_policy, retention, selective_scan
from ultrazoo.ops import segments as rule
from ultrazoo.ops.loader import cpu_isa
from ultrazoo.registry import registry

L = 80
RETURNING = [[1, 2, 1, 2], [5, 0, 5, 3, 5], [2, 0, 1, 0, 0, 2], [0, 9, 1, 2, 1]]
VALID = [[1, 1, 0, 1], [3, 0, 2, 0, 2, 1], [0, 7, 0, 7], [0, 0, 0], [9, 1, 5, 5, 2]]


def runs(*pairs: tuple[int, int]) -> list[int]:
    row = [number for number, length in pairs for _ in range(length)]
    return row + [0] * (L - len(row))


ROWS = torch.tensor(
    [
        runs((1, 5), (0, 2), (1, 25), (0, 1), (1, 31), (0, 3), (1, 2)),  # at the borders of chunks of 32 and 64
        runs((0, 3), (4, 1), (0, 1), (4, 1), (0, 9), (2, 30), (0, 2), (3, 1), (0, 4), (3, 1)),
        runs(),
        runs((6, L)),
        runs(*[(8, 1), (0, 1)] * 20, *[(5, 2), (0, 1)] * 13),
    ]
)


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def decay(x: Tensor) -> Tensor:
    return torch.tensor([-0.05, -0.3], dtype=torch.promote_types(x.dtype, torch.float32))


def scanned(u: Tensor, delta: Tensor, B: Tensor, C: Tensor, z: Tensor, segments: Tensor, **options: Any) -> Tensor:
    wide = torch.promote_types(u.dtype, torch.float32)
    A = -torch.arange(1.0, 4.0, dtype=wide).expand(5, 3)
    return selective_scan(
        u, delta, A, B, C, torch.ones(5, dtype=wide), z=z, delta_softplus=True, segments=segments, **options
    )


SCAN = ((5,), (5,), (3,), (3,), (5,))
HEADS = ((2, 8), (2, 8), (2, 6))
MEMORY = ((2, 4), (2, 4), (2, 4), (2,), (2,), (2,))


def remembered(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, eta: Tensor, theta: Tensor, segments: Tensor) -> Tensor:
    real = segments.ne(0)[..., None, None]
    initial = draw(1, 2, 4, 4, dtype=q.dtype)
    y = memory_scan(
        q * real, k * real, v * real, -keep.exp(), -eta.exp(), theta.sigmoid(), initial, segments=segments, chunk_size=7
    )
    return y * real


def convolved(groups: int, side: Any) -> Callable[[Tensor, Tensor], Tensor]:
    torch.manual_seed(0)
    conv = SegmentConv1d(6, 6, 4, groups=groups, side=side).double()
    return lambda x, segments: conv.to(x.dtype)(x, segments)


OPS: dict[str, tuple[tuple[tuple[int, ...], ...], int, Callable[..., Tensor]]] = {
    "retention": (HEADS, 0, lambda q, k, v, s: retention(q, k, v, decay(q), segments=s)),
    "retention causal": (HEADS, 0, lambda q, k, v, s: retention(q, k, v, decay(q), segments=s, causal=True)),
    "retention C7": (HEADS, 0, lambda q, k, v, s: retention(q, k, v, decay(q), segments=s, chunk_size=7)),
    "attention": (HEADS, 0, lambda q, k, v, s: attention(q, k, v, segments=s)),
    "attention prefix": (HEADS, 3, lambda q, k, v, s: attention(q, k, v, segments=s, prefix=3)),
    "attention sigmoid": (HEADS, 0, lambda q, k, v, s: attention(q, k, v, segments=s, kind="sigmoid")),
    "selective_scan": (SCAN, 0, scanned),
    "selective_scan reverse": (SCAN, 0, lambda *given: scanned(*given, reverse=True)),
}
HELPERS: dict[str, tuple[tuple[tuple[int, ...], ...], int, Callable[..., Tensor]]] = {
    "conv dense": (((6,),), 0, convolved(1, "both")),
    "conv left": (((6,),), 0, convolved(6, "left")),
    "conv right": (((6,),), 0, convolved(6, "right")),
    "memory": (MEMORY, 0, remembered),
}
POLICIES = [
    pytest.param("compiled", torch.float32, marks=pytest.mark.skipif(cpu_isa() is None, reason="no compiled kernels")),
    ("reference", torch.float32),
    ("reference", torch.float64),
]


def close(got: Tensor, want: Tensor) -> None:
    size = 1e-5 if want.dtype == torch.float32 else 1e-11
    torch.testing.assert_close(got, want, rtol=size, atol=size * max(1.0, want.abs().max().item()))


def compare_with_cut(
    shapes: tuple[tuple[int, ...], ...], prefix: int, run: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    """Outputs and gradients of ``run(*tensors, segments)`` against those of each row with its padding cut out."""
    lengths = [L + (prefix if number else 0) for number in range(len(shapes))]
    tensors = [
        draw(len(ROWS), length, *shape, dtype=dtype, seed=seed).requires_grad_()
        for seed, (length, shape) in enumerate(zip(lengths, shapes, strict=True))
    ]
    y = run(*tensors, ROWS)
    weights = draw(*y.shape, dtype=dtype, seed=9)
    gradients = torch.autograd.grad(y, tensors, weights)
    assert y[ROWS.eq(0)].eq(0).all()
    for row, keep in enumerate(ROWS.ne(0)):
        if not keep.any():
            assert all(gradient[row, gradient.shape[1] - L :].eq(0).all() for gradient in gradients)
            continue

        def cut(x: Tensor, row: int = row, keep: Tensor = keep) -> Tensor:
            first = x.shape[1] - L
            return torch.cat((x[row : row + 1, :first], x[row : row + 1, first:][:, keep]), dim=1).detach()

        alone = [cut(x).requires_grad_() for x in tensors]
        expected = run(*alone, ROWS[row : row + 1, keep])
        close(cut(y), expected.detach())
        for got, want in zip(gradients, torch.autograd.grad(expected, alone, cut(weights)), strict=True):
            close(cut(got), want)
            assert got[row, got.shape[1] - L :][~keep].eq(0).all()


@pytest.mark.parametrize(("policy", "dtype"), POLICIES)
@pytest.mark.parametrize("name", OPS)
def test_an_op_passes_over_padding_inside_documents(name: str, policy: Any, dtype: torch.dtype) -> None:
    with kernel_policy(policy):
        compare_with_cut(*OPS[name], dtype)


@pytest.mark.parametrize("name", HELPERS)
def test_a_helper_passes_over_padding_inside_documents(name: str) -> None:
    compare_with_cut(*HELPERS[name], torch.float64)


@contextmanager
def always_moving() -> Iterator[None]:
    """The way of a GPU and of compiled graphs: tokens are moved whether there are gaps or not."""
    with mock.patch.object(rule, "_has_gaps", lambda segments: True):
        yield


@pytest.mark.parametrize("name", [*OPS, *HELPERS])
def test_tokens_that_always_move_give_the_same(name: str) -> None:
    with always_moving(), kernel_policy("reference"):
        compare_with_cut(*{**OPS, **HELPERS}[name], torch.float64)


@pytest.mark.parametrize("name", OPS)
def test_dropout_of_attention_is_that_of_the_reference(name: str) -> None:
    if not name.startswith("attention"):
        return
    shapes, prefix, _ = OPS[name]
    q, k, v = (draw(len(ROWS), L + (prefix if i else 0), *shape, dtype=torch.float32) for i, shape in enumerate(shapes))
    options: Any = {"dropout": 0.4, "seed": torch.tensor(11), "prefix": prefix, "segments": ROWS}
    found = []
    for policy in ("auto", "reference"):
        with kernel_policy(policy):  # type: ignore[arg-type]
            found.append(attention(q, k, v, **options))
    close(*found)


@pytest.mark.parametrize(("policy", "dtype"), POLICIES)
@pytest.mark.parametrize("row", [*RETURNING, [1, -1, 0]])
@pytest.mark.parametrize("name", OPS)
def test_an_op_refuses(name: str, row: list[int], policy: Any, dtype: torch.dtype) -> None:
    shapes, prefix, run = OPS[name]
    segments = torch.tensor([[4] * len(row), row])
    tensors = [draw(2, len(row) + (prefix if i else 0), *shape, dtype=dtype) for i, shape in enumerate(shapes)]
    wrong = "returns at position" if min(row) == 0 or min(row) == 1 else "expected 0 at padding and positive numbers"
    with kernel_policy(policy), pytest.raises((ValueError, RuntimeError), match=rf"segments\[row 1\].*{wrong}"):
        run(*tensors, segments)


def helpers() -> dict[str, Callable[[Tensor], object]]:
    conv = SegmentConv1d(6, 6, 3)
    return {
        "checked": checked,
        "starts": starts,
        "positions": lambda s: positions(s, s.shape[1]),
        "same_document": same_document,
        "attention_mask": attention_mask,
        "conv": lambda s: conv(draw(*s.shape, 6, dtype=torch.float32), s),
    }


@pytest.mark.parametrize("row", [*RETURNING, [1, -1, 0]])
@pytest.mark.parametrize("name", helpers())
def test_a_helper_refuses(name: str, row: list[int]) -> None:
    with pytest.raises(ValueError, match=r"segments\[row 0\]"):
        helpers()[name](torch.tensor([row]))


@pytest.mark.parametrize(
    ("segments", "error", "match"),
    [
        (torch.ones(4).long(), ValueError, r"got shape \(4,\), expected \(B, L\)"),
        (torch.ones(1, 4), TypeError, "got torch.float32, expected integers"),
        (torch.ones(1, 4).bool(), TypeError, "got torch.bool, expected integers"),
    ],
)
def test_what_is_no_numbering_is_refused(segments: Tensor, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        Gaps.of(segments)


def breaks_the_rule(row: list[int]) -> bool:
    """The rule, written out."""
    real = [number for number in row if number]
    ended: set[int] = set()
    for before, number in zip([0, *real], real, strict=False):
        if number < 0 or number in ended:
            return True
        if number != before:
            ended.add(before)
    return False


@pytest.mark.parametrize("row", RETURNING)
def test_the_rule_refuses(row: list[int]) -> None:
    assert breaks_the_rule(row)


def small_rows(count: int) -> Iterator[list[int]]:
    generator = torch.Generator().manual_seed(3)
    for number in range(count):
        length = int(torch.randint(1, 9, (), generator=generator))
        row = torch.randint(-1 if number % 20 == 0 else 0, 4, (length,), generator=generator).tolist()
        yield sorted(row, reverse=number % 2 == 0) if number % 3 == 0 else row


@pytest.mark.parametrize("rows", [VALID, RETURNING, list(small_rows(600))], ids=["valid", "returning", "random"])
def test_every_check_agrees_with_the_rule(rows: list[list[int]]) -> None:
    verdicts = []
    for row in rows:
        segments, wrong = torch.tensor([row]), breaks_the_rule(row)
        verdicts.append(wrong)
        assert bool(rule._is_valid(segments)) is not wrong, row
        x = torch.ones(1, len(row), 1, 1)
        for run in (
            lambda s=segments: Gaps.of(s),
            lambda s=segments, x=x: retention(x, x, x, torch.zeros(1), segments=s),
        ):
            try:
                run()
            except (ValueError, RuntimeError):
                assert wrong, row
            else:
                assert not wrong, row
    assert len(rows) < 100 or 0.2 < sum(verdicts) / len(verdicts) < 0.8


def test_gaps_move_to_the_end_of_their_rows_and_back() -> None:
    segments = torch.tensor([[1, 0, 1, 0, 2, 0], [0, 3, 0, 0, 3, 4], [0, 5, 5, 0, 6, 0]])
    gaps = Gaps.of(segments)
    assert gaps.segments is not None
    assert gaps.segments.tolist() == [[1, 1, 0, 2, 0, 0], [0, 3, 3, 4, 0, 0], [0, 5, 5, 0, 6, 0]]
    assert torch.equal(gaps.open(gaps.segments), segments)
    assert torch.equal(checked(segments), segments)
    x = torch.arange(18.0).view(3, 6).requires_grad_()
    closed = gaps.close(x)
    assert closed[0].tolist() == [0, 2, 3, 4, 5, 1]
    (closed * torch.arange(6)).sum().backward()
    assert x.grad is not None
    assert x.grad[0].tolist() == [0, 5, 1, 2, 3, 4]


def test_nothing_moves_without_gaps() -> None:
    segments = torch.tensor([[0, 1, 1, 0, 2, 0]])
    gaps, x = Gaps.of(segments), torch.ones(1, 6)
    assert gaps.segments is segments
    assert gaps.close(x) is x
    assert gaps.open(x) is x
    assert Gaps.of(None).close(x) is x


def test_positions_and_starts_pass_over_gaps() -> None:
    segments = torch.tensor([[0, 1, 0, 1, 1, 0, 2, 0, 0, 2, 0]])
    assert positions(segments, 11).tolist() == [[0, 0, 0, 1, 2, 0, 0, 0, 0, 1, 0]]
    assert starts(segments).long().tolist() == [[1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 1]]


def test_a_compiled_graph_checks_and_moves() -> None:
    def every(x: Tensor, segments: Tensor) -> tuple[Tensor, ...]:
        gaps = Gaps.of(segments)
        moved = gaps.open(gaps.close(x) * positions(gaps.segments, x.shape[1])[..., None])
        return moved, same_document(segments), starts(segments), checked(segments)

    compiled = torch.compile(every, fullgraph=True, backend="aot_eager")
    x = draw(len(ROWS), L, 3)
    for got, want in zip(compiled(x, ROWS), every(x, ROWS), strict=True):
        assert torch.equal(got, want)
    bad = ROWS.clone()
    bad[3, :4] = torch.tensor([1, 2, 1, 2])
    with pytest.raises(ValueError, match=r"segments\[row 3\]: document 1 returns at position 2 after document 2"):
        compiled(x, bad)


MIXERS = sorted(registry().mixers())
MODEL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_heads": 2,
    "retention_heads": 2,
    "ffn_hidden_size": 16,
    "dropout": 0.0,
    "max_position_embeddings": L,
}


def model(**changes: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    built = build_model(ModelConfig(**{**MODEL, **changes})).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return built


ONE_LAYER = {"num_layers": 1, "layer_pattern": ["standard_attn"]}
NARROW = {"use_factorized_embedding": True, "factorized_embedding_dim": 8}
MODELS: dict[str, dict[str, Any]] = {
    "every mixer": {"num_layers": len(MIXERS), "layer_pattern": MIXERS},
    "learned positions": {**ONE_LAYER, "position_embedding": "learned"},
    "sinusoidal positions": {**ONE_LAYER, "position_embedding": "sinusoidal", "ffn_type": "moe"},
    "embedding convolution": {**ONE_LAYER, **NARROW, "use_embedding_conv": True},
    "hope": {"num_layers": 1, "layer_pattern": ["titan_attn"], "use_hope": True},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("policy", ["auto", "reference"])
def test_a_model_passes_over_padding_inside_documents(name: str, policy: Any) -> None:
    built = model(**MODELS[name]).to(torch.float32 if policy == "auto" else torch.float64)
    ids = torch.randint(5, 50, ROWS.shape, generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(ROWS.eq(0) | ids.remainder(3).ne(0), IGNORED)
    rows = [(ids, ROWS, labels)]
    for row, keep in enumerate(ROWS.ne(0)):
        if keep.any():
            rows.append((ids[row : row + 1, keep], ROWS[row : row + 1, keep], labels[row : row + 1, keep]))
    losses = []
    with kernel_policy(policy):
        for given in rows:
            output = built(given[0], given[1], given[2])
            losses.append((output.hidden.detach(), output.loss_sum))
        whole = torch.autograd.grad(losses[0][1], list(built.parameters()), allow_unused=True)
        parts = torch.autograd.grad(sum(loss for _, loss in losses[1:]), list(built.parameters()), allow_unused=True)
    tolerance = 2e-4 if policy == "auto" else 1e-10
    real = losses[0][0][ROWS.ne(0)]
    apart = torch.cat([hidden[0] for hidden, _ in losses[1:]])
    torch.testing.assert_close(real, apart, rtol=tolerance, atol=tolerance * apart.abs().max().item())
    for got, want in zip(whole, parts, strict=True):
        assert (got is None) == (want is None)
        if got is not None and want is not None:
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * max(1, want.abs().max().item()))


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_model_refuses_a_document_that_returns(name: str, autocast: bool) -> None:
    built = model(num_layers=1, layer_pattern=[name])
    segments = torch.tensor([[1, 1, 1, 1], [1, 2, 1, 2]])
    ids = torch.full_like(segments, 7)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with pytest.raises(ValueError, match=r"segments\[row 1\]: document 1 returns"):
            built(ids, segments)
        with pytest.raises((ValueError, RuntimeError), match=r"segments\[row 1\]: document 1 returns"):
            built.layers[0].mixer(torch.randn(2, 4, 16), segments)


def test_a_compiled_model_refuses_a_document_that_returns() -> None:
    built = model(num_layers=1, layer_pattern=["standard_attn"])
    compiled = torch.compile(built.encode, fullgraph=True, backend="aot_eager")
    ids = torch.full((2, 6), 7)
    compiled(ids, torch.tensor([[1, 1, 0, 1, 1, 1], [1, 1, 2, 2, 0, 0]]))
    with pytest.raises(ValueError, match=r"segments\[row 1\]: document 1 returns"):
        compiled(ids, torch.tensor([[1, 1, 0, 1, 1, 1], [1, 2, 1, 2, 0, 0]]))
