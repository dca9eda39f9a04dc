"""What every block asks about documents in a row: where they start, who sees whom, what is padding."""

from __future__ import annotations

import pytest
import torch

from ultrazoo.nn.segments import mask_padding, positions, same_document, starts

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
