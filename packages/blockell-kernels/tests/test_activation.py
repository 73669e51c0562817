"""`block_ell_linear(activation=...)` against the layer and torch's function, by name."""

import itertools

import pytest
import torch

from blockell_format import transposed_index
from blockell_kernels import _activated_ops, block_ell_linear, probe_size
from blockell_kernels._activation import ACTIVATIONS, activate

FUNCTIONS = [name for name in ACTIVATIONS if name != "none"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def inputs(o, dtype):
    return [t.detach().to(dtype).requires_grad_() for t in (o.x, o.values, o.bias)]


def call(o, tensors, **kwargs):
    x, values, bias = tensors
    return block_ell_linear(
        x, values, o.col_indices, bias, row_group=o.row_group, num_live=o.num_live, **kwargs
    )


def gradients(o, y, tensors):
    y.backward(o.dy.to(y.dtype).view(y.shape))
    names = ("dx", "dvalues", "dbias")
    return {"y": y.detach()} | {n: t.grad for n, t in zip(names, tensors, strict=True)}


def compare(got, want, tolerance):
    for name, expected in want.items():
        actual = got[name].double().reshape(expected.shape)
        assert torch.isfinite(actual).all(), name
        if expected.numel():
            error = (actual - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
            assert error < tolerance, (name, float(error))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_every_backend(make_operands, activation, dtype):
    for backend, N in itertools.product(("auto", "gathered", "dense", "reference"), (0, 9)):
        o = make_operands(N, 4, 6, 3, 8, row_group=2, spare=1)
        exact, tensors = inputs(o, torch.float64), inputs(o, dtype)
        want = gradients(o, activate(call(o, exact), activation), exact)
        got = gradients(o, call(o, tensors, activation=activation, backend=backend), tensors)
        compare(got, want, TOLERANCE[dtype])


@pytest.mark.parametrize("sample", ["norms", "gradient"])
def test_statistics_and_leading_dimensions(make_operands, sample):
    o = make_operands(12, 4, 6, 3, 8)
    want, got = (torch.zeros(probe_size(4, 6), requires_grad=True) for _ in range(2))
    tensors, others = inputs(o, torch.float32), inputs(o, torch.float32)
    gradients(o, activate(call(o, others, probe=want, sample=sample), "silu"), others)
    x = tensors[0].view(3, 4, 48)
    y = call(o, [x, *tensors[1:]], probe=got, sample=sample, activation="silu")
    assert y.shape == (3, 4, 32)
    gradients(o, y, tensors)
    torch.testing.assert_close(got.grad, want.grad)
    torch.testing.assert_close(tensors[0].grad, others[0].grad)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_only_what_is_asked_for(make_operands, wanted):
    o = make_operands(9, 4, 6, 3, 8)
    everything, tensors = inputs(o, torch.float32), inputs(o, torch.float32)
    want = gradients(o, call(o, everything, activation="relu"), everything)
    for i, t in enumerate(tensors):
        t.requires_grad_(i in wanted)
    got = gradients(o, call(o, tensors, activation="relu"), tensors)
    for i, name in enumerate(("dx", "dvalues", "dbias")):
        assert (got[name] is not None) == (i in wanted), name
        if i in wanted:
            torch.testing.assert_close(got[name], want[name])


def test_the_result_may_be_changed_in_place(make_operands):
    o = make_operands(12, 4, 6, 3, 8)
    for shape in ((12, 48), (3, 4, 48)):
        tensors = inputs(o, torch.float32)
        call(o, [tensors[0].view(shape), *tensors[1:]], activation="relu").mul_(2).sum().backward()
        assert tensors[1].grad is not None


def test_autocast_and_second_derivatives(make_operands):
    o = make_operands(9, 4, 6, 3, 8)
    tensors = inputs(o, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = call(o, tensors, activation="gelu")
    assert y.dtype == torch.bfloat16
    compare({"y": y.detach()}, {"y": activate(call(o, tensors), "gelu").detach()}, 2e-2)
    assert gradients(o, y, tensors)["dvalues"].dtype == torch.float32
    y = call(o, tensors, activation="gelu")
    (g,) = torch.autograd.grad(y.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        g.sum().backward()


@pytest.mark.parametrize("keep_pre", [True, False])
def test_opcheck(make_operands, keep_pre):
    o = make_operands(5, 4, 3, 2, 8, row_group=2)
    tensors = inputs(o, torch.float32)
    if not keep_pre:
        tensors = [t.detach() for t in tensors]
    x, values, bias = tensors
    probe = torch.zeros(probe_size(4, 3), requires_grad=keep_pre)
    args = (x, values, o.col_indices, bias, probe, *transposed_index(o.col_indices, 3), 2, 2)
    args += ("gradient", "gelu", keep_pre, "")
    torch.library.opcheck(_activated_ops.activated_op, args)


@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False)])
def test_opcheck_backward(make_operands, needs):
    o = make_operands(5, 4, 3, 2, 8)
    h = torch.randn_like(o.dy)
    args = (o.dy, h, o.x, o.values, o.col_indices, None, None, 3, 8, 1, 2, *needs, "norms")
    torch.library.opcheck(_activated_ops.activated_backward_op, (*args, "silu", ""))


@pytest.mark.slow
def test_compiled_in_one_graph(make_operands):
    torch._dynamo.reset()
    o = make_operands(33, 8, 6, 3, 16, row_group=4)
    eager, tensors = inputs(o, torch.float32), inputs(o, torch.float32)
    want = gradients(o, call(o, eager, activation="gelu"), eager)
    compiled = torch.compile(lambda *t: call(o, t, activation="gelu"), fullgraph=True)
    compare(gradients(o, compiled(*tensors), tensors), want, 1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*tensors), want["y"])


def test_message(make_operands):
    o = make_operands(5, 4, 3, 2, 8)
    with pytest.raises(ValueError, match=r"activation \(='swish'\) must be one of none, gelu, "):
        call(o, inputs(o, torch.float32), activation="swish")


@pytest.mark.slow
@pytest.mark.parametrize("row_group", [1, 4])
def test_plain_layers_gradient_is_laid_out_as_the_compiler_expects(make_operands, row_group):
    """Without spare slots the CPU's weight gradient is a permuted view, unless it is copied."""
    torch._dynamo.reset()
    o = make_operands(33, 8, 6, 3, 16, row_group=row_group)
    eager, tensors = inputs(o, torch.float32), inputs(o, torch.float32)
    want = gradients(o, call(o, eager, backend="gathered"), eager)
    compiled = torch.compile(lambda *t: call(o, t, backend="gathered"), fullgraph=True)
    got = gradients(o, compiled(*tensors), tensors)
    compare(got, want, 1e-5)
    assert got["dvalues"].is_contiguous()
