"""dropout: the generator's published vectors, one mask for every kernel, and gradients through that mask."""

from __future__ import annotations

import pytest
import torch
from kernel_parts import each_isa, hold
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ultrazoo.nn.dropout import Dropout, drop
from ultrazoo.ops import dropout, kernel_policy
from ultrazoo.ops.dropout.op import SPEC
from ultrazoo.ops.dropout.reference import dropout_mask
from ultrazoo.ops.loader import use_cpu_isa
from ultrazoo.ops.philox import philox

CPU = torch.device("cpu")
SEED = torch.tensor(0x0123456789ABCDEF)
every_isa = each_isa("dropout")


@pytest.mark.parametrize(
    ("counter", "key", "words"),  # philox4x32 with 10 rounds, from the known answers of Random123
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0_A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_generator_gives_its_published_numbers(counter: tuple[int, ...], key: int, words: tuple[int, ...]) -> None:
    c0, c1, c2, c3 = (torch.tensor(word) for word in counter)
    assert tuple(int(word) for word in philox((c0, c1, c2, c3), torch.tensor(key))) == words


@every_isa
def test_kernels_draw_the_bits_of_the_reference(isa: str) -> None:
    with use_cpu_isa(isa), kernel_policy("compiled"):
        for elements in (1, 127, 128, 129, 4097):
            for p in (0.1, 0.5, 1 - 2**-16):
                for seed in (torch.tensor(0), torch.tensor(-1), SEED):
                    mask = dropout_mask(torch.Size([elements]), seed, round((1 - p) * 65536), CPU)
                    for dtype in (torch.float32, torch.bfloat16, torch.float16):
                        y = dropout(torch.ones(elements, dtype=dtype), p, seed=seed)
                        assert torch.equal(y.ne(0), mask)


@every_isa
def test_parity(isa: str) -> None:
    hold("dropout", lambda dtype: SPEC.samples(CPU, dtype), isa)
    hold("dropout", lambda dtype: SPEC.samples(CPU, dtype), isa, torch.bfloat16)


def test_the_share_kept_and_the_scale_are_exact() -> None:
    n, p = 1 << 20, 0.1
    y = dropout(torch.ones(n), p, seed=SEED)
    keep = round((1 - p) * 65536)
    kept = y.ne(0)
    assert kept.double().mean().item() == pytest.approx(keep / 65536, abs=4 * (0.09 / n) ** 0.5)
    assert torch.equal(y[kept], torch.full_like(y[kept], 65536 / keep))
    assert dropout(torch.ones(n), 1 - 1e-9, seed=SEED).max() == 65536  # never nothing


def test_draws_look_independent() -> None:
    kept = dropout_mask(torch.Size([1 << 20]), SEED, 32768, CPU).double() - 0.5
    bound = 5 * 0.25 / (1 << 20) ** 0.5
    for lag in (1, 2, 7, 8, 15, 16, 17, 64, 128, 1024):
        assert (kept[lag:] * kept[:-lag]).mean().abs() < bound, lag
    for other in (torch.tensor(1), SEED + 1, SEED + (1 << 32)):
        mask = dropout_mask(torch.Size([1 << 20]), other, 32768, CPU).double() - 0.5
        assert (kept * mask).mean().abs() < bound


def test_the_gradient_passes_where_the_value_passed() -> None:
    x = torch.randn(3, 50, 7).mT.requires_grad_()
    y = dropout(x, 0.3, seed=SEED)
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    assert torch.equal(x.grad, torch.where(y.ne(0), 65536 / round(0.7 * 65536), 0.0))
    small = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: dropout(t, 0.3, seed=SEED).sin(), small)
    assert torch.autograd.gradgradcheck(lambda t: dropout(t, 0.3, seed=SEED).sin(), small)


def test_what_is_dropped_is_zero_even_where_it_is_not_finite() -> None:
    y = dropout(torch.full((1000,), torch.nan), 0.5, seed=SEED)
    assert torch.equal(y.eq(0), ~dropout_mask(y.shape, SEED, 32768, CPU))
    assert y.isnan().any()


def test_threads_change_no_bit() -> None:
    x, threads = torch.randn(300_001), torch.get_num_threads()
    try:
        outputs = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            outputs.append(dropout(x, 0.2, seed=SEED))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_the_global_generator_decides_and_zero_draws_nothing() -> None:
    x = torch.randn(64)
    torch.manual_seed(3)
    first, second = dropout(x, 0.5), dropout(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.5), first) and not torch.equal(first, second)
    state = torch.get_rng_state()
    assert dropout(x, 0.0) is x
    assert torch.equal(torch.get_rng_state(), state)


def test_recomputing_an_activation_draws_the_same_mask() -> None:
    layer = nn.Sequential(nn.Linear(16, 16), Dropout(0.5), nn.Tanh(), nn.Linear(16, 4))

    def gradients(recompute: bool) -> list[Tensor]:
        torch.manual_seed(1)
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(2))
        y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        return list(torch.autograd.grad(y.square().sum(), list(layer.parameters())))

    assert all(torch.equal(a, b) for a, b in zip(gradients(False), gradients(True), strict=True))


def test_the_module_drops_in_training_only_and_each_time_anew() -> None:
    module, x = Dropout(0.5), torch.ones(1000)
    assert not torch.equal(module(x), module(x))
    assert module.eval()(x) is x
    assert Dropout(0.0)(x) is x and drop(x, 0.5, False) is x


def test_compile_in_one_graph() -> None:
    x = torch.randn(7, 33, requires_grad=True)
    function = torch.compile(lambda t: dropout(t, 0.4, seed=SEED).sin(), fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(function(x).sum(), x)
    (expected,) = torch.autograd.grad(dropout(x, 0.4, seed=SEED).sin().sum(), x)
    torch.testing.assert_close(grad, expected)
    drawing = torch.compile(lambda t: dropout(t, 0.4), fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    first, second = drawing(x), drawing(x)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: dropout(x, 1.0), ValueError, r"p: got 1.0, expected a probability in \[0, 1\)"),
        (lambda x: dropout(x, -0.1), ValueError, "p: got -0.1"),
        (lambda x: dropout(x, 0.1, seed=torch.tensor([1])), ValueError, r"seed: got shape \(1,\)"),
        (lambda x: dropout(x, 0.1, seed=torch.tensor(1.0)), TypeError, "seed: got torch.float32"),
        (lambda x: dropout(x.long(), 0.1), TypeError, "x: got torch.int64"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.ones(4))  # type: ignore[operator]
