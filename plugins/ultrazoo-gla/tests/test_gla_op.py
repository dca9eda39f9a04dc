"""The op against its recurrence and its matrix, and its kernels against its reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from ultrazoo_gla import op
from ultrazoo_gla.op import gated_linear_attention
from ultrazoo_gla.reference import gated_linear_attention_matrix, gated_linear_attention_recurrent

from ultrazoo.errors import KernelUnavailableError
from ultrazoo.ops import kernel_policy, kernel_status
from ultrazoo.testing.parity import check_op, isas_of

CPU = torch.device("cpu")
SEGMENTS = torch.tensor([[0, 0, *[1] * 17, *[2] * 20, 3], [5] * 40, [*[1] * 16, *[0] * 8, *[4] * 16]])


def arguments(*, directions: int = 2, B: int = 3, L: int = 40, temperature: float = 1.0) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(B, L, 2, width, generator=draw, dtype=torch.float64) for width in (5, 5, 3))
    gates = torch.randn(B, L, directions, 2, 5, generator=draw, dtype=torch.float64)
    return q, k, v, torch.nn.functional.logsigmoid(gates) / temperature


@pytest.fixture(scope="module")
def compiled() -> None:
    if not kernel_status(op.SPEC.name, "cpu").compiled:
        pytest.skip("no C++ compiler here")


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["whole rows", "packed"])
@pytest.mark.parametrize("directions", [1, 2])
def test_it_is_the_recurrence_and_the_matrix(directions, segments):
    q, k, v, gates = arguments(directions=directions)
    log_gate = gates.squeeze(2) if directions == 1 else gates
    o = gated_linear_attention(q, k, v, log_gate, segments=segments, causal=directions == 1)
    M = gated_linear_attention_matrix(q, k, gates, segments)
    torch.testing.assert_close(o, torch.einsum("bhnm,bmhv->bnhv", M, v), rtol=1e-12, atol=1e-12)
    recurrent = gated_linear_attention_recurrent(q, k, v, gates, segments)
    torch.testing.assert_close(o, recurrent, rtol=1e-12, atol=1e-12)
    if segments is not None:
        assert o[segments == 0].eq(0).all()


def test_a_token_counts_itself_once_and_one_gate_serves_both_directions():
    q, k, v, gates = arguments(directions=1, L=1)
    own = (q * k).sum(-1, keepdim=True) * v
    torch.testing.assert_close(gated_linear_attention(q, k, v, gates.squeeze(2)), own)
    q, k, v, gates = arguments(directions=1)
    shared = gated_linear_attention(q, k, v, gates.squeeze(2))
    torch.testing.assert_close(shared, gated_linear_attention(q, k, v, gates.expand(-1, -1, 2, -1, -1)))
    turned = gated_linear_attention(*(x.flip(1) for x in (q, k, v, gates.squeeze(2))))
    torch.testing.assert_close(shared, turned.flip(1))


def test_swapping_the_gates_reads_backwards():
    q, k, v, gates = arguments()
    turned = gated_linear_attention(*(x.flip(1) for x in (q, k, v, gates.flip(2))))
    torch.testing.assert_close(gated_linear_attention(q, k, v, gates), turned.flip(1))


def test_open_gates_are_linear_attention_and_shut_gates_leave_the_token_alone():
    q, k, v, gates = arguments()
    everything = torch.einsum("bnhk,bmhk,bmhv->bnhv", q, k, v)
    torch.testing.assert_close(gated_linear_attention(q, k, v, torch.zeros_like(gates)), everything)
    own = (q * k).sum(-1, keepdim=True) * v
    torch.testing.assert_close(gated_linear_attention(q, k, v, torch.full_like(gates, -1e4)), own)


@pytest.mark.parametrize("policy", ["compiled", "reference"])
def test_nothing_overflows_where_gates_are_nearly_shut(policy, compiled):
    q, k, v, gates = (x.float().requires_grad_() for x in arguments(temperature=1 / 300, L=64))
    with kernel_policy(policy):
        o = gated_linear_attention(q, k, v, gates)
        gradients = torch.autograd.grad(o.square().sum(), (q, k, v, gates))
    assert all(x.isfinite().all() for x in (o, *gradients))


def test_a_long_row_keeps_its_accuracy(compiled):
    q, k, v, gates = arguments(B=1, L=3000, temperature=1e4)  # a memory of thousands of tokens, all gates alike
    gates = gates[:, :1].expand_as(gates)
    truth = gated_linear_attention(q, k, v, gates)
    with kernel_policy("compiled"):
        o = gated_linear_attention(q.float(), k.float(), v.float(), gates.float())
    assert (o - truth).abs().max() / truth.abs().max() < 3e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_kernel_is_at_par_with_the_reference(dtype, compiled):
    for isa in isas_of(op.SPEC, CPU):
        checks = list(check_op(op.SPEC, CPU, dtype, "compiled", isa=isa, opcheck=False))
        assert len(checks) >= 9
        assert not [str(check) for check in checks if not check.ok]


def test_the_reference_is_sound():
    checks = list(check_op(op.SPEC, CPU, torch.float32, "reference"))
    assert {"opcheck", "gradcheck in float64"} <= {check.check for check in checks}
    assert not [str(check) for check in checks if not check.ok]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"k": torch.zeros(1, 4, 2, 3)}, ValueError, r"q, k: got \(1, 4, 2, 5\) and \(1, 4, 2, 3\)"),
        ({"v": torch.zeros(1, 5, 2, 3)}, ValueError, r"v: got \(1, 5, 2, 3\), expected \(1, 4, 2, V\)"),
        ({"log_gate": torch.zeros(1, 4, 2)}, ValueError, r"expected \(1, 4, 2, 5\).* or \(1, 4, 2, 2, 5\)"),
        ({"log_gate": torch.zeros(1, 4, 2, 2, 5), "causal": True}, ValueError, "the shape of q$"),
        ({"segments": torch.ones(1, 4)}, TypeError, "expected integers"),
        ({"q": torch.zeros(1, 4, 2, 5, dtype=torch.int64)}, TypeError, "expected a floating-point dtype"),
        ({"v": torch.zeros(1, 4, 2, 5).to(torch.float8_e4m3fn)}, TypeError, "v: got torch.float8_e4m3fn"),
    ],
)
def test_a_wrong_argument_is_named(change, error, text):
    given: dict[str, Any] = {name: torch.zeros(1, 4, 2, 5) for name in ("q", "k", "v", "log_gate")}
    with pytest.raises(error, match=text):
        gated_linear_attention(**{**given, **change})


@pytest.mark.parametrize(
    ("index", "wrong", "text"),
    [
        (1, torch.zeros(1, 4, 2, 6), "k: got shape"),
        (2, torch.zeros(1, 5, 2, 3), "v: got shape"),
        (2, torch.zeros(1, 4, 2, 3).half(), "v: got .*float16"),
        (3, torch.zeros(1, 4, 3, 2, 5), "log_gate: D: got 3, expected 1 to 2"),
        (3, torch.zeros(1, 4, 2, 2, 5).double(), "log_gate: got .*float64"),
        (4, torch.ones(1, 3, dtype=torch.int64), "segments: got shape"),
        (4, torch.ones(1, 4), "segments: got .*float32"),
        (5, torch.zeros(1, 4, 2, 4), "grad: got shape"),
    ],
)
def test_the_op_itself_refuses_wrong_arguments_with_and_without_kernel(compiled, index, wrong, text):
    good = [torch.zeros(1, 4, 2, 5), torch.zeros(1, 4, 2, 5), torch.zeros(1, 4, 2, 3), torch.zeros(1, 4, 2, 2, 5), None]
    given = [*good, torch.zeros(1, 4, 2, 3)]
    given[index] = wrong
    *inputs, grad = given
    for backend in ("default", "reference"):
        forward = getattr(torch.ops.gla.gated_linear_attention, backend)
        backward = getattr(torch.ops.gla.gated_linear_attention_backward, backend)
        if index < 5:
            with pytest.raises((RuntimeError, ValueError, TypeError), match=f"gla::gated_linear_attention: {text}"):
                forward(*inputs)
        with pytest.raises(
            (RuntimeError, ValueError, TypeError), match=f"gla::gated_linear_attention_backward: {text}"
        ):
            backward(grad, *inputs)


@pytest.mark.parametrize("policy", ["compiled", "reference"])
def test_autocast_changes_no_bit_and_forward_mode_is_refused(compiled, policy):
    inputs = [x.float().requires_grad_() for x in arguments()]
    with kernel_policy(policy):
        expected = torch.autograd.grad(gated_linear_attention(*inputs).sum(), inputs)
        with torch.autocast("cpu", torch.bfloat16):
            got = torch.autograd.grad(gated_linear_attention(*inputs).sum(), inputs)
        with pytest.raises(NotImplementedError, match="forward-mode AD"):
            torch.func.jvp(lambda q: gated_linear_attention(q, *inputs[1:]), (inputs[0],), (inputs[0],))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_fp64_has_no_kernel():
    with kernel_policy("compiled"), pytest.raises(KernelUnavailableError, match="no compiled kernel"):
        gated_linear_attention(*arguments())


@pytest.mark.optional
def test_causal_is_what_the_authors_compute():
    naive = pytest.importorskip("fla.ops.gla.naive").naive_recurrent_gla
    q, k, v, gates = (x.float() for x in arguments(directions=1, temperature=16))
    theirs, _ = naive(q, k, v, gates.squeeze(2))  # scales q by K^-0.5
    ours = gated_linear_attention(q * q.shape[3] ** -0.5, k, v, gates.squeeze(2), causal=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.optional
def test_both_directions_are_the_authors_on_the_row_and_on_its_mirror_image():
    naive = pytest.importorskip("fla.ops.gla.naive").naive_recurrent_gla
    q, k, v, gates = (x.float().requires_grad_() for x in arguments(temperature=16))
    forward, _ = naive(q, k, v, gates[:, :, 0])
    backward, _ = naive(*(x.flip(1) for x in (q, k, v, gates[:, :, 1])))
    scale = q.shape[3] ** -0.5
    theirs = forward + backward.flip(1) - scale * (q * k).sum(-1, keepdim=True) * v
    ours = gated_linear_attention(q * scale, k, v, gates)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    probe = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0))
    for one, other in zip(
        torch.autograd.grad(ours, (q, k, v, gates), probe),
        torch.autograd.grad(theirs, (q, k, v, gates), probe),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
