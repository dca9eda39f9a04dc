"""The convolution along the row: every side, dense and depthwise, against its definition written as loops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ultrazoo.nn.conv import SegmentConv1d

ROWS = torch.tensor([[1, 1, 1, 2, 2, 3, 0, 0], [0, 0, 7, 7, 0, 4, 4, 4]])
SHAPES = [(6, 6, 6), (6, 4, 1), (6, 4, 2)]
SIDES = ["left", "right", "both"]


def definition(conv, x, segments):
    """The first line of the docstring, token by token."""
    channels_out, per_group, taps = conv.weight.shape
    y = torch.zeros(*x.shape[:2], channels_out, dtype=x.dtype)
    group_out = channels_out // conv.groups
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            if segments is not None and segments[b, t] == 0:
                continue
            for j in range(taps):
                s = t - conv.reach + j
                if not 0 <= s < x.shape[1] or (segments is not None and segments[b, s] != segments[b, t]):
                    continue
                for c in range(channels_out):
                    first = c // group_out * per_group
                    y[b, t, c] += conv.weight[c, :, j].detach() @ x[b, s, first : first + per_group]
            y[b, t] += conv.bias.detach()
    return y


@pytest.mark.parametrize("taps", [1, 3, 4, 12])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("channels_in, channels_out, groups", SHAPES)
def test_agrees_with_its_definition(channels_in, channels_out, groups, side, taps):
    torch.manual_seed(0)
    conv = SegmentConv1d(channels_in, channels_out, taps, groups, side).double()
    x = torch.randn(2, 8, channels_in, dtype=torch.float64)
    for segments in (None, ROWS):
        torch.testing.assert_close(conv(x, segments), definition(conv, x, segments))


@pytest.mark.parametrize("side, reads", [("left", {1, 2, 3, 4}), ("right", {4, 5, 6, 7}), ("both", {3, 4, 5, 6})])
def test_each_side_reads_the_tokens_that_it_promises(side, reads):
    conv = SegmentConv1d(2, 2, 4, 2, side)
    x = torch.randn(1, 9, 2, requires_grad=True)
    conv(x)[0, 4].sum().backward()
    assert {t for t in range(9) if x.grad[0, t].abs().max() > 0} == reads


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("channels_in, channels_out, groups", SHAPES)
@pytest.mark.parametrize("segments", [None, ROWS[:, 1:8]])
def test_gradients_in_fp64(channels_in, channels_out, groups, side, segments):
    torch.manual_seed(0)
    conv = SegmentConv1d(channels_in, channels_out, 3, groups, side).double()
    x = torch.randn(2, 7, channels_in, dtype=torch.float64, requires_grad=True)

    def call(x, weight, bias):
        return torch.func.functional_call(conv, {"weight": weight, "bias": bias}, (x, segments))

    assert torch.autograd.gradcheck(call, (x, conv.weight, conv.bias))


def test_depthwise_equals_the_convolution_of_torch_on_full_rows():
    conv = SegmentConv1d(6, 6, 4, 6, "left")
    x = torch.randn(3, 11, 6)
    expected = F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), conv.weight, conv.bias, groups=6).transpose(1, 2)
    torch.testing.assert_close(conv(x), expected)


@pytest.mark.parametrize("groups", [6, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_near_as_rounding_allows(groups, dtype):
    torch.manual_seed(0)
    conv = SegmentConv1d(6, 6, 4, groups).to(dtype)
    x = torch.randn(2, 8, 6).to(dtype)
    for segments in (None, ROWS):
        y = conv(x, segments)
        assert y.dtype is dtype
        exact = definition(conv.double(), x.double(), segments)
        assert (y.double() - exact).abs().max() <= 2 * (exact.to(dtype).double() - exact).abs().max() + 4 * torch.finfo(
            dtype
        ).eps
        conv.to(dtype)


@pytest.mark.parametrize("groups", [4, 1])
def test_full_rows_as_segments_change_nothing_and_batches_may_be_empty(groups):
    conv = SegmentConv1d(4, 4, 3, groups)
    x = torch.randn(2, 5, 4)
    torch.testing.assert_close(conv(x, torch.ones(2, 5, dtype=torch.int64)), conv(x))
    assert conv(x[:0]).shape == conv(x[:0], torch.ones(0, 5, dtype=torch.int64)).shape == (0, 5, 4)


@pytest.mark.parametrize("groups", [4, 1])
def test_compiles_without_a_graph_break_forward_and_backward(groups):
    conv = SegmentConv1d(4, 4, 3, groups)
    x = torch.randn(2, 8, 4)
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    for segments in (None, ROWS):
        conv.zero_grad()
        expected = conv(x, segments)
        expected.square().sum().backward()
        grad = conv.weight.grad.clone()
        conv.zero_grad()
        got = compiled(x, segments)
        got.square().sum().backward()
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(conv.weight.grad, grad)


def test_initial_values_are_those_of_torch():
    torch.manual_seed(3)
    theirs = torch.nn.Conv1d(6, 6, 4, groups=6)
    torch.manual_seed(3)
    ours = SegmentConv1d(6, 6, 4, 6)
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.bias, theirs.bias)
    assert SegmentConv1d(6, 6, 4, 6, bias=False).bias is None


@pytest.mark.parametrize("kernel_size, groups, word", [(0, 1, "kernel_size 0"), (3, 4, "4 groups for 6 -> 6")])
def test_impossible_shapes_are_refused(kernel_size, groups, word):
    with pytest.raises(ValueError, match=word):
        SegmentConv1d(6, 6, kernel_size, groups)
