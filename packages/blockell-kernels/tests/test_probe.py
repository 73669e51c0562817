"""The statistics that a probe collects: right, once per micro-batch, and only when asked for."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from blockell_kernels import _reference as reference
from blockell_kernels import _stats, block_ell_linear, block_grad_norms, probe_size


def by_hand(o):
    """row_sq [R], col_sq [C], norm_sq [R, C] in float64."""
    d = o.to(torch.float64)
    R, B = d.values.shape[0], d.values.shape[-1]
    row_sq = d.dy.view(-1, R, B).square().sum((0, 2))
    col_sq = d.x.view(-1, d.C, B).square().sum((0, 2))
    return row_sq, col_sq, reference.block_grad_norms(d.dy, d.x, B).square()


def new_probe(o):
    return torch.zeros(probe_size(o.values.shape[0], o.C), requires_grad=True)


def run(o, probe, sample="gradient", backend=None, x=None, values=None):
    x = o.x if x is None else x
    values = o.values if values is None else values
    return block_ell_linear(
        x, values, o.col_indices, o.bias, row_group=o.row_group, num_live=o.num_live,
        probe=probe, sample=sample, backend=backend,
    )  # fmt: skip


def expected_probe(o, sample):
    row_sq, col_sq, norm_sq = by_hand(o)
    if sample == "norms":
        norm_sq = torch.zeros_like(norm_sq)
    return torch.cat([row_sq, col_sq, norm_sq.flatten()]).float()


@pytest.mark.parametrize("backend", ["auto", "gathered", "dense", "reference"])
@pytest.mark.parametrize("sample", ["norms", "gradient"])
@pytest.mark.parametrize("train_values", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_equal_to_hand_computed(make_operands, backend, sample, train_values, dtype):
    o = make_operands(21, 6, 5, 2, 8, row_group=2, spare=1, dtype=dtype)
    probe = new_probe(o)
    values = o.values.requires_grad_(train_values)
    run(o, probe, sample, backend, values=values).backward(o.dy)
    assert probe.grad.dtype == torch.float32
    torch.testing.assert_close(probe.grad, expected_probe(o, sample), rtol=1e-5, atol=1e-5)


def test_sums_that_need_several_chunks(make_operands, monkeypatch):
    monkeypatch.setattr(_stats, "MAX_BUFFER_ELEMENTS", 1000)
    monkeypatch.setattr(_stats, "SUM_ELEMENTS_CPU", 300)
    o = make_operands(50, 6, 5, 2, 8)
    for backend in ("gathered", "dense"):
        probe = new_probe(o)
        run(o, probe, "gradient", backend, values=o.values.requires_grad_()).backward(o.dy)
        torch.testing.assert_close(probe.grad, expected_probe(o, "gradient"), rtol=1e-5, atol=1e-5)


def test_adds_up_over_micro_batches(make_operands):
    batches = [make_operands(N, 4, 5, 2, 8, seed=N) for N in (5, 9, 1, 0)]
    probe = new_probe(batches[0])
    for o in batches:
        run(o, probe).backward(o.dy)
    total = sum(expected_probe(o, "gradient") for o in batches)
    torch.testing.assert_close(probe.grad, total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_counted_once_under_activation_checkpointing(make_operands, use_reentrant):
    o = make_operands(9, 4, 5, 2, 8)
    probe, x = new_probe(o), o.x.requires_grad_()
    y = checkpoint(lambda x: run(o, probe, x=x).tanh(), x, use_reentrant=use_reentrant)
    y.sum().backward()
    once = new_probe(o)
    run(o, once, x=x).tanh().sum().backward()
    torch.testing.assert_close(probe.grad, once.grad)
    assert once.grad.abs().sum() > 0


def test_used_by_two_calls_in_one_graph(make_operands):
    o = make_operands(9, 4, 5, 2, 8)
    probe = new_probe(o)
    (run(o, probe) * o.dy).sum().add((run(o, probe) * o.dy).sum()).backward()
    torch.testing.assert_close(probe.grad, 2 * expected_probe(o, "gradient"), rtol=1e-5, atol=1e-5)


def test_absent_without_gradient(make_operands):
    o = make_operands(9, 4, 5, 2, 8)
    probe = new_probe(o)
    with torch.no_grad():
        assert not run(o, probe).requires_grad
    with torch.inference_mode():
        run(o, probe)
    x = o.x.requires_grad_()
    run(o, probe, "none", x=x).backward(o.dy)
    run(o, probe.detach(), "gradient", x=x).backward(o.dy)
    assert probe.grad is None
    assert not run(o, probe, "none", x=o.x.detach()).requires_grad


def test_statistics_cost_no_gradient_of_anything_else(make_operands):
    o = make_operands(9, 4, 5, 2, 8)
    probe = new_probe(o)
    run(o, probe).backward(o.dy)
    assert o.x.grad is None
    assert o.values.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(12,), (3, 4), (0,)], ids=str)
def test_block_grad_norms(make_operands, dtype, shape):
    N = torch.Size(shape).numel()
    o = make_operands(N, 4, 5, 2, 8, dtype=dtype)
    norms = block_grad_norms(o.dy.view(*shape, -1) if N else o.dy, o.x.view(*shape, 40), 8)
    assert norms.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(norms.double(), by_hand(o)[2].sqrt(), rtol=1e-5, atol=1e-5)


def test_block_grad_norms_holds_only_a_slice_of_the_gradient(make_operands, monkeypatch):
    largest = 0
    matmul = torch.Tensor.__matmul__

    def spy(a, b):
        nonlocal largest
        product = matmul(a, b)
        largest = max(largest, product.numel())
        return product

    monkeypatch.setattr(_stats, "MAX_BUFFER_ELEMENTS", 2048)
    monkeypatch.setattr(torch.Tensor, "__matmul__", spy)
    o = make_operands(4, 16, 8, 2, 16)
    block_grad_norms(o.dy, o.x, 16)
    assert 0 < largest <= 2048 < 16 * 16 * 8 * 16
