"""attention: against other formulas of it, at the edges of its tiles, with one dropout mask for every kernel."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from kernel_parts import each_isa, hold, random_segments
from torch import Tensor
from torch.nn import functional as F

from ultrazoo.ops import attention, kernel_policy
from ultrazoo.ops.attention import op as module
from ultrazoo.ops.loader import use_cpu_isa
from ultrazoo.spec import Sample

SEED = torch.tensor(-77)
KINDS = ("softmax", "sigmoid")
every_isa = each_isa("attention")
each_kind = pytest.mark.parametrize("kind", KINDS)


def draw(B: int, L: int, H: int, K: int, V: int, dtype: torch.dtype, prefix: int = 0, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, L, H, K), (B, prefix + L, H, K), (B, prefix + L, H, V))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def widths(dtype: torch.dtype) -> Iterator[Sample]:
    for K, V in ((1, 1), (3, 17), (4, 5), (26, 64), (33, 2), (64, 26), (128, 33), (0, 3), (3, 0)):
        for kind in KINDS:
            kwargs = {"kind": kind, "dropout": 0.2, "seed": SEED}
            yield Sample(name=f"K{K} V{V}", args=tuple(draw(1, 70, 2, K, V, dtype)), kwargs=kwargs)


def lengths(dtype: torch.dtype) -> Iterator[Sample]:
    for L in (1, 2, 7, 8, 9, 47, 48, 49, 97, 255, 256, 257, 300):  # around 8 and 48 queries, 256 keys
        for kind in KINDS:
            kwargs = {"kind": kind, "dropout": 0.1 * (L % 2), "seed": SEED}
            yield Sample(name=f"L{L} {kind}", args=tuple(draw(1, L, 2, 5, 6, dtype, seed=L)), kwargs=kwargs)
    yield Sample(name="H0", args=tuple(draw(2, 7, 0, 3, 4, dtype)))


def documents(dtype: torch.dtype) -> Iterator[Sample]:
    for seed, prefix in enumerate((0, 3, 260)):
        for kind in KINDS:
            segments = random_segments(2, 200, seed)
            kwargs = {"segments": segments, "kind": kind, "prefix": prefix, "dropout": 0.2 * (seed > 0), "seed": SEED}
            args = tuple(draw(2, 200, 2, 6, 9, dtype, prefix, seed))
            yield Sample(name=f"documents, prefix {prefix}", args=args, kwargs=kwargs)


@every_isa
@pytest.mark.parametrize("samples", [widths, lengths, documents], ids=lambda f: f.__name__)
def test_edges(isa: str, samples: object) -> None:
    hold("attention", samples, isa)  # type: ignore[arg-type]


@every_isa
def test_edges_of_half_precision(isa: str) -> None:
    hold("attention", documents, isa, torch.bfloat16)


@every_isa
@each_kind
def test_kernels_drop_the_pairs_that_the_reference_drops(isa: str, kind: module.Kind) -> None:
    """With unit vectors for values the output is the matrix of weights."""
    q, k, _ = draw(2, 150, 3, 4, 4, torch.float32)
    v = torch.eye(150).expand(2, 3, 150, 150).transpose(1, 2)
    for segments in (None, random_segments(2, 150, 4)):
        found = []
        for policy in ("compiled", "reference"):
            with use_cpu_isa(isa), kernel_policy(policy):  # type: ignore[arg-type]
                found.append(attention(q, k, v, segments=segments, dropout=0.3, seed=SEED, kind=kind))
        assert torch.equal(found[0].eq(0), found[1].eq(0))
        assert (found[0] - found[1]).abs().max() < 1e-5


def test_softmax_is_that_of_torch() -> None:
    segments = random_segments(2, 90, 1)
    q, k, v = draw(2, 90, 3, 8, 5, torch.float32)
    mask = segments[:, None, :, None].eq(segments[:, None, None])
    for given, seen in ((None, None), (segments, mask)):
        o = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=seen, scale=0.7)
        o = o.transpose(1, 2) if given is None else o.transpose(1, 2) * given.ne(0)[:, :, None, None]
        torch.testing.assert_close(attention(q, k, v, segments=given, scale=0.7), o, rtol=1e-5, atol=1e-6)


def test_sigmoid_is_its_formula_token_by_token() -> None:
    segments = random_segments(1, 40, 2)[0]
    q, k, v = (x[0, :, 0] for x in draw(1, 40, 1, 4, 3, torch.float64))
    o = attention(q[None, :, None], k[None, :, None], v[None, :, None], segments=segments[None], kind="sigmoid")
    for n in range(40):
        seen = segments.eq(segments[n])
        weights = torch.sigmoid(k[seen] @ q[n] / 2 - math.log(seen.sum()))
        expected = weights @ v[seen] if segments[n] else torch.zeros(3, dtype=torch.float64)
        torch.testing.assert_close(o[0, n, 0], expected)


@each_kind
def test_a_prefix_is_seen_by_every_document(kind: module.Kind) -> None:
    q, k, v = draw(1, 12, 2, 4, 4, torch.float32, prefix=3)
    segments = torch.tensor([[1] * 5 + [2] * 6 + [0]])
    o = attention(q, k, v, segments=segments, kind=kind, prefix=3)
    for tokens in (slice(0, 5), slice(5, 11)):
        own = [torch.cat((x[:, :3], x[:, 3:][:, tokens]), dim=1) for x in (k, v)]
        torch.testing.assert_close(o[:, tokens], attention(q[:, tokens], *own, kind=kind, prefix=3))
    assert not o[:, 11].any()


@each_kind
def test_a_nan_reaches_its_document_and_no_other(kind: module.Kind) -> None:
    q, k, v = draw(2, 200, 2, 8, 8, torch.float32)
    segments = random_segments(2, 200, 7)
    k[1, 120, 1, 3] = torch.nan
    assert segments[1, 120] > 0
    reached = torch.zeros(2, 200, 2, dtype=torch.bool)
    reached[1, :, 1] = segments[1].eq(segments[1, 120])
    assert torch.equal(attention(q, k, v, segments=segments, kind=kind).isnan().any(3), reached)


@each_kind
def test_dropout_keeps_the_mean_and_draws_each_pair_by_itself(kind: module.Kind) -> None:
    B, L, H = 2, 128, 2
    q = torch.zeros(B, L, H, 1)
    v = torch.eye(L)[None, :, None].expand(B, L, H, L)
    masks = [attention(q, q, v, dropout=0.5, seed=seed, kind=kind).ne(0) for seed in (SEED, SEED + 1)]
    flat = torch.stack([m[b, :, h].flatten() for m in masks for b in range(B) for h in range(H)]).double() - 0.5
    bound = 5 * 0.25 / (L * L) ** 0.5
    same = flat @ flat.T / (L * L)
    assert (same - torch.diag(same.diag())).abs().max() < bound and flat.mean(1).abs().max() < bound
    square = flat.unflatten(1, (L, L))
    for rows, columns in ((1, 0), (0, 1), (8, 0), (0, 16), (1, 1)):
        other = square[:, rows:, columns:] * square[:, : L - rows, : L - columns]
        assert other.mean((1, 2)).abs().max() < 1.2 * bound, (rows, columns)
    values = draw(1, 40, 1, 4, 4, torch.float32)
    exact = attention(*values, kind=kind)
    mean = torch.stack([attention(*values, dropout=0.2, kind=kind) for _ in range(4000)]).mean(0)
    assert (mean - exact).abs().max() < 0.1 * exact.abs().max()


@each_kind
def test_threads_change_no_bit_of_output_or_gradients(kind: module.Kind) -> None:
    tensors = [x.requires_grad_() for x in draw(3, 200, 2, 8, 6, torch.float32, prefix=2)]
    segments, threads = random_segments(3, 200, 5), torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            o = attention(*tensors, segments=segments, dropout=0.2, seed=SEED, kind=kind, prefix=2)
            found.append([o, *torch.autograd.grad(o.square().sum(), tensors)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@each_kind
def test_without_a_kernel_torch_computes_the_same(kind: module.Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [(None, 0), (random_segments(2, 90, 1), 0), (random_segments(2, 90, 2), 4)]
    for segments, prefix in cases:
        tensors = [x.requires_grad_() for x in draw(2, 90, 3, 8, 5, torch.float32, prefix)]
        found = []
        for has in (True, False):
            with monkeypatch.context() as patch:
                if not has:
                    patch.setattr(module, "_runs_plain", lambda *_: True)
                    patch.setattr(module, "_attention", None)
                o = attention(*tensors, segments=segments, kind=kind, prefix=prefix)
            found.append([o, *torch.autograd.grad((o * o.detach().cos()).sum(), tensors)])
        assert found[1][0].is_contiguous()
        for one, other in zip(*found, strict=True):
            assert one.shape == other.shape
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_which_calls_go_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for policy, without_kernel in (("auto", True), ("reference", False), ("compiled", False)):
        with kernel_policy(policy):  # type: ignore[arg-type]
            assert not module._runs_plain("cpu", "softmax")
            with monkeypatch.context() as patch:
                patch.setattr(module._attention, "has_kernel", lambda device: False)
                assert module._runs_plain("cpu", "softmax") == without_kernel
                assert module._runs_plain("cuda", "softmax") == (policy != "reference")
                assert module._runs_plain("cuda", "sigmoid") == without_kernel


def test_the_global_generator_decides() -> None:
    q, k, v = draw(1, 20, 2, 4, 4, torch.float32)
    torch.manual_seed(3)
    first, second = (attention(q, k, v, dropout=0.5) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(attention(q, k, v, dropout=0.5), first) and not torch.equal(first, second)
    state = torch.get_rng_state()
    attention(q, k, v)
    assert torch.equal(torch.get_rng_state(), state)


def test_slices_of_one_projection_are_read_as_they_lie() -> None:
    qkv = torch.randn(2, 30, 9, 8)
    parts = qkv.split(3, dim=2)
    assert torch.equal(attention(*parts), attention(*(x.contiguous() for x in parts)))
    by_head = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in parts]
    assert torch.equal(attention(*by_head), attention(*parts))


def test_compile_in_one_graph() -> None:
    tensors = [x.requires_grad_() for x in draw(1, 20, 2, 4, 6, torch.float32)]
    segments = torch.tensor([[1] * 12 + [2] * 8])

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, segments=segments, dropout=0.3, seed=SEED).sin()

    function = torch.compile(call, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        torch.autograd.grad(function(*tensors).sum(), tensors),
        torch.autograd.grad(call(*tensors).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


@each_kind
@pytest.mark.parametrize("autocast", [False, True])
def test_without_a_kernel_it_compiles_in_one_graph_too(
    kind: module.Kind, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_runs_plain", torch.compiler.assume_constant_result(lambda *_: True))
    tensors = [x.requires_grad_() for x in draw(1, 20, 2, 4, 6, torch.float32)]
    segments = torch.tensor([[1] * 12 + [2] * 8])

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, segments=segments, kind=kind)

    function = torch.compile(call, fullgraph=True, backend="aot_eager")
    want = call(*tensors)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got, eager = function(*tensors), call(*tensors)
    assert torch.equal(eager, want)
    torch.testing.assert_close(got, want)
    exact = 3e-2 if autocast else 1e-5  # torch traces a backward under the autocast of the call
    for ours, theirs in zip(
        torch.autograd.grad(got.sum(), tensors), torch.autograd.grad(want.sum(), tensors), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=exact, atol=exact)


def test_arguments_that_do_not_fit_are_refused() -> None:
    q, k, v = draw(2, 6, 2, 4, 3, torch.float32)
    for match, changed in {
        r"k: got shape \(2, 6, 2, 4\), expected \(B, P \+ L, H, K\) with B 2, P \+ L 8, H 2, K 4": {"prefix": 2},
        r"segments: got shape \(2, 5\), expected \(B, L\) with B 2, L 6": {
            "segments": torch.ones(2, 5, dtype=torch.int64)
        },
        r"dropout: got 1.0": {"dropout": 1.0},
        r"seed: got shape \(1,\), expected \(\)": {"dropout": 0.1, "seed": torch.tensor([1])},
        r"kind: got 'relu', expected one of softmax, sigmoid": {"kind": "relu"},
    }.items():
        with pytest.raises(ValueError, match=match):
            attention(q, k, v, **changed)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"segments: got torch\.bool"):
        attention(q, k, v, segments=torch.ones(2, 6, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"seed: got torch\.int32"):
        attention(q, k, v, dropout=0.1, seed=torch.tensor(1, dtype=torch.int32))
    with pytest.raises(ValueError, match="v: got"):
        attention(q, k, v[:, :3])
    q.requires_grad_()
    (grad,) = torch.autograd.grad(attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()
