"""The short eager way: taken where nothing watches, with the operator's results and checks."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from blockell_kernels import _dense, _eager, _functional, _plan, block_ell_linear


class Recorder(TorchDispatchMode):
    """Notes the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def results(o, **options):
    """y and every gradient."""
    inputs = [t.clone().requires_grad_() for t in (o.x, o.values, o.bias)]
    x, values, bias = inputs
    options = {"row_group": o.row_group, "num_live": o.num_live} | options
    y = block_ell_linear(x, values, o.col_indices, bias, **options)
    return [y.detach(), *torch.autograd.grad(y, inputs, o.dy.view_as(y))]


def test_it_is_taken_where_nothing_watches(make_operands, monkeypatch):
    def operator(*_):
        raise AssertionError("the dispatcher was asked")

    monkeypatch.setattr(_functional, "linear_op", operator)
    monkeypatch.setattr(_eager, "linear_backward_op", operator)
    results(make_operands(5, 4, 3, 2, 8))


def test_a_dispatch_mode_sees_the_operator_forward_and_backward(make_operands):
    with Recorder() as recorder:
        results(make_operands(5, 4, 3, 2, 8))
    assert "blockell::linear" in recorder.names
    assert "blockell::linear_backward" in recorder.names


def test_a_mode_entered_for_the_backward_pass_only_sees_it_too(make_operands):
    o = make_operands(5, 4, 3, 2, 8)
    x = o.x.clone().requires_grad_()
    y = block_ell_linear(x, o.values, o.col_indices)
    with Recorder() as recorder:
        y.backward(o.dy)
    assert "blockell::linear_backward" in recorder.names


@pytest.mark.parametrize("backend", ["gathered", "dense", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_both_ways_compute_the_same_bits(make_operands, backend, dtype):
    o = make_operands(12, 4, 3, 2, 8, row_group=2, spare=1, dtype=dtype)
    short = results(o, backend=backend)
    with Recorder():
        long = results(o, backend=backend)
    for a, b in zip(short, long, strict=True):
        assert torch.equal(a, b)


def test_leading_dimensions_and_autocast_are_as_by_the_operator(make_operands):
    o = make_operands(12, 4, 3, 2, 8)
    o.x = o.x.view(2, 6, -1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        short = results(o)
        with Recorder():
            long = results(o)
    assert short[0].dtype == torch.bfloat16
    assert [g.dtype for g in short[1:]] == [torch.float32] * 3
    for a, b in zip(short, long, strict=True):
        assert torch.equal(a, b)


def test_a_checked_call_vouches_for_its_own_kind_only(make_operands):
    o = make_operands(5, 4, 3, 2, 8)
    block_ell_linear(o.x, o.values, o.col_indices, o.bias)
    with pytest.raises(ValueError, match="bias has shape"):
        block_ell_linear(o.x, o.values, o.col_indices, o.bias[1:])
    with pytest.raises(ValueError, match="values has dtype"):
        block_ell_linear(o.x, o.values.double(), o.col_indices, o.bias)
    with pytest.raises(ValueError, match="col_indices has dtype"):
        block_ell_linear(o.x, o.values, o.col_indices.long(), o.bias)
    with pytest.raises(ValueError, match="row_group"):
        block_ell_linear(o.x, o.values, o.col_indices, o.bias, row_group=3)
    with pytest.raises(ValueError, match="sample"):
        block_ell_linear(o.x, o.values, o.col_indices, o.bias, sample="norms")
    with pytest.raises(ValueError, match="backend"):
        block_ell_linear(o.x, o.values, o.col_indices, o.bias, backend="fast")


def test_the_environment_is_read_at_every_call(make_operands, monkeypatch):
    o = make_operands(5, 4, 3, 2, 8)
    seen = []
    for name in ("reference", "dense"):
        backend = _plan.get_backend(name)
        forward = type(backend).forward

        def noted(self, *args, name=name, forward=forward):
            seen.append(name)
            return forward(self, *args)

        monkeypatch.setattr(type(backend), "forward", noted)
        monkeypatch.setenv("BLOCKELL_BACKEND", name)
        block_ell_linear(o.x, o.values, o.col_indices)
    assert seen == ["reference", "dense"]


@pytest.mark.parametrize(("N", "K", "copies"), [(50, 2, 1), (50, 3, 2), (50, 4, 1), (3, 3, 1)])
def test_one_dense_copy_serves_a_training_step(make_operands, monkeypatch, N, K, copies):
    """Except where a model would take more memory than a dense one."""
    made, place = [], _dense.to_dense
    monkeypatch.setattr(_dense, "to_dense", lambda *args: made.append(1) or place(*args))
    o = make_operands(N, 4, 4, K, 8)
    found = results(o, backend="dense")
    assert len(made) == copies
    for actual, expected in zip(found, results(o, backend="reference"), strict=True):
        torch.testing.assert_close(actual, expected)


def test_a_second_derivative_is_refused(make_operands):
    o = make_operands(5, 4, 3, 2, 8)
    x = o.x.clone().requires_grad_()
    y = block_ell_linear(x, o.values.requires_grad_(), o.col_indices)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        dx.sum().backward()


def test_function_transforms_go_by_the_operator(make_operands):
    """Where the short way would run on wrapped tensors, whatever the operator says is said."""
    o = make_operands(5, 4, 3, 2, 8)
    taken = []

    def f(x):
        taken.append(_eager.plain(x, o.values, o.col_indices, None))
        return x.sum()

    torch.func.grad(f)(o.x)
    assert taken == [False]


def test_plans_and_checks_are_bounded(make_operands, monkeypatch):
    monkeypatch.setattr(_plan, "MAX_PLANS", 3)
    monkeypatch.setattr(_eager, "MAX_CHECKED", 3)
    monkeypatch.setattr(_plan, "_plans", {})
    monkeypatch.setattr(_eager, "_checked", {})
    for N in range(1, 9):
        o = make_operands(N, 4, 3, 2, 8)
        block_ell_linear(o.x, o.values, o.col_indices)
        assert len(_plan._plans) <= 3
        assert len(_eager._checked) <= 3
