"""What every block asks about documents in a row: where they start, who sees whom, what is padding."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from ultrazoo.config import ModelConfig
from ultrazoo.model import build_model
from ultrazoo.nn.conv import SegmentConv1d
from ultrazoo.nn.segments import Gaps, checked, mask_padding, positions, same_document, shared, starts
from ultrazoo.ops import segments as rule

ROWS = torch.tensor([[1, 1, 1, 2, 2, 3, 0, 0], [0, 0, 7, 7, 0, 4, 4, 4]])


def test_starts_are_first_tokens_and_padding():
    expected = torch.tensor([[1, 0, 0, 1, 0, 1, 1, 1], [1, 1, 1, 0, 1, 1, 0, 0]], dtype=torch.bool)
    assert torch.equal(starts(ROWS), expected)


def test_first_column_is_a_start_although_the_last_column_has_the_same_number():
    assert starts(torch.ones(1, 4, dtype=torch.int64)).tolist() == [[True, False, False, False]]


def test_positions_count_within_the_document():
    expected = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0, 1, 2]])
    assert torch.equal(positions(ROWS, 8, ROWS.device), expected)


def test_positions_without_segments_are_one_row():
    assert positions(None, 3, torch.device("cpu")).tolist() == [[0, 1, 2]]


def test_same_document_agrees_with_its_definition():
    mask = same_document(ROWS)
    assert mask.shape == (2, 1, 8, 8)
    for b in range(2):
        for n in range(8):
            for m in range(8):
                expected = bool(ROWS[b, n] > 0 and ROWS[b, n] == ROWS[b, m])
                assert mask[b, 0, n, m].item() is expected


@pytest.mark.parametrize("shape", [(2, 8), (2, 8, 3), (2, 8, 3, 5)])
def test_mask_padding_overwrites_even_nan_and_passes_no_gradient(shape):
    x = torch.randn(shape)
    x[ROWS == 0] = float("nan")
    x.requires_grad_()
    y = mask_padding(x, ROWS)
    assert torch.isfinite(y).all()
    assert torch.equal(y[ROWS > 0], x[ROWS > 0])
    assert (y[ROWS == 0] == 0).all()
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, (ROWS > 0).to(x.dtype).reshape(2, 8, *[1] * (len(shape) - 2)).expand(shape))


def test_mask_padding_without_segments_is_the_input_itself():
    x = torch.randn(2, 3, 4)
    assert mask_padding(x, None) is x


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (3, 1)])
def test_empty_and_single_rows(shape):
    segments = torch.ones(shape, dtype=torch.int64)
    assert starts(segments).shape == shape
    assert positions(segments, shape[1], segments.device).shape == shape
    assert same_document(segments).shape == (shape[0], 1, shape[1], shape[1])


def test_compiles_without_a_graph_break():
    def every(segments):
        return starts(segments), positions(segments, 8, segments.device), same_document(segments)

    compiled = torch.compile(every, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(ROWS), every(ROWS), strict=True):
        assert torch.equal(got, expected)


GAPS = torch.tensor([[0, 1, 0, 1, 1, 0, 2], [3, 3, 0, 3, 2, 2, 2], [1, 1, 1, 2, 2, 0, 0]])


def test_transforms_of_torch_func_give_what_autograd_gives():
    conv = SegmentConv1d(4, 4, 3).double()
    x, along = (torch.randn(3, 7, 4, dtype=torch.float64) for _ in range(2))

    def convolve(x: Tensor, segments: Tensor) -> Tensor:
        y: Tensor = conv(x, segments)
        return y * (1 + positions(segments, x.shape[1]).unsqueeze(2))

    for segments in (GAPS, torch.ones_like(GAPS)):
        leaf = x.clone().requires_grad_()
        y = convolve(leaf, segments)
        (expected,) = torch.autograd.grad(y.square().sum(), leaf)
        got = torch.func.grad(lambda x, s=segments: convolve(x, s).square().sum())(x)
        torch.testing.assert_close(got, expected)
        slope = torch.func.jvp(lambda x, s=segments: convolve(x, s).square().sum(), (x,), (along,))[1]
        torch.testing.assert_close(slope, (expected * along).sum())
        each = torch.vmap(lambda x, s: convolve(x[None], s[None])[0])(x, segments)
        torch.testing.assert_close(each, y.detach())


def test_vmap_checks_too():
    with pytest.raises(ValueError, match=r"document 1 returns at position 2"):
        torch.vmap(lambda s: positions(s[None], 4)[0])(torch.tensor([[1, 1, 1, 1], [1, 2, 1, 2]]))


def test_fake_tensors_and_traces_depend_on_no_numbers():
    with FakeTensorMode() as mode:
        assert positions(mode.from_tensor(GAPS), 7).shape == GAPS.shape
    full = torch.ones_like(GAPS)
    graph = make_fx(lambda s: positions(s, 7), tracing_mode="fake")(full)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(lambda s: positions(s, 7), full)
    for function in (graph, traced):
        assert torch.equal(function(GAPS), positions(GAPS, 7))


def test_a_model_checks_its_segments_once(monkeypatch: pytest.MonkeyPatch):
    calls = []
    real = rule._has_gaps
    monkeypatch.setattr(rule, "_has_gaps", lambda segments: calls.append(segments) or real(segments))
    options = {"vocab_size": 50, "hidden_size": 16, "num_heads": 2, "ffn_hidden_size": 16, "num_layers": 3}
    model = build_model(ModelConfig(layer_pattern=["standard_attn"], **options)).eval()
    ids = torch.arange(21).reshape(3, 7)
    for segments in (torch.ones_like(GAPS), GAPS):
        calls.clear()
        with torch.no_grad():
            got = model.encode(ids, segments)
        assert len(calls) <= 2  # that of the moves of gaps is the second
        with torch.no_grad(), monkeypatch.context() as patch:
            patch.setattr("ultrazoo.model.shared", _checked_each_time)
            assert torch.equal(model.encode(ids, segments), got)
        assert len(calls) > 3
    with pytest.raises(ValueError, match="returns at position 2"):
        model.encode(ids, torch.tensor([[1, 2, 1, 2, 2, 2, 2]]).expand(3, 7))
    assert rule._shared.known[0] is None


@pytest.mark.parametrize("segments", [torch.ones_like(GAPS), GAPS], ids=["full", "gaps"])
def test_a_checkpoint_computes_again_what_shared_segments_gave(segments: Tensor):
    conv = SegmentConv1d(4, 4, 3).double()
    x, found = torch.randn(3, 7, 4, dtype=torch.float64), []
    for again in (False, True):
        leaf = x.clone().requires_grad_()
        with shared(segments) as known:
            y = checkpoint(conv, leaf, known, use_reentrant=False) if again else conv(leaf, known)
        found.append([y, *torch.autograd.grad(y.square().sum(), leaf)])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@contextmanager
def _checked_each_time(segments: Tensor) -> Iterator[Tensor]:
    yield checked(segments)


def test_shared_segments_are_known_by_the_tensor_not_by_its_numbers():
    with shared(GAPS) as segments:
        gaps = Gaps.of(segments)
        assert Gaps.of(segments) is gaps
        assert gaps.move
        assert Gaps.of(segments.clone()) is not gaps
        with pytest.raises(ValueError, match="returns at position 2"):
            Gaps.of(torch.tensor([[1, 2, 1]]))
    assert Gaps.of(segments) is not gaps


def test_without_a_transform_no_token_moves_where_there_is_no_gap():
    assert not Gaps.of(torch.ones_like(GAPS)).move
