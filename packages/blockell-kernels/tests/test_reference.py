"""The reference against the dense operator that it stands for, and against finite differences."""

import pytest
import torch

from blockell_format import to_dense
from blockell_kernels import _reference as reference
from blockell_kernels import block_ell_linear

SHAPES = [(7, 3, 5, 2, 4, 1), (5, 4, 3, 3, 2, 2), (1, 6, 2, 1, 8, 3)]  # N, R, C, K, B, row_group


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_dense_linear(make_operands, shape):
    *sizes, row_group = shape
    o = make_operands(*sizes, row_group=row_group, dtype=torch.float64)
    R, K, B, _ = o.values.shape
    W = to_dense(o.values, o.col_indices, R, o.C, K, B)
    expected = {
        "y": o.x @ W.T + o.bias,
        "dx": o.dy @ W,
        "dbias": o.dy.sum(0),
    }
    got = {
        "y": reference.forward(o.x, o.values, o.col_indices, o.bias),
        "dx": reference.grad_input(o.dy, o.values, o.col_indices, o.C),
        "dbias": reference.grad_bias(o.dy),
    }
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-12, atol=1e-12, msg=name)
    dW = (o.dy.T @ o.x).view(R, B, o.C, B)
    dvalues = reference.grad_values(o.dy, o.x, o.col_indices, B)
    for r in range(R):
        for k in range(K):
            torch.testing.assert_close(dvalues[r, k], dW[r, :, int(o.col_indices[r, k])])
    norms = reference.block_grad_norms(o.dy, o.x, B)
    torch.testing.assert_close(norms, dW.permute(0, 2, 1, 3).flatten(2).norm(dim=2))


@pytest.mark.parametrize("backend", ["auto", "gathered", "dense", "reference"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradcheck(make_operands, backend, shape):
    *sizes, row_group = shape
    o = make_operands(*sizes, row_group=row_group, dtype=torch.float64)

    def f(x, values, bias):
        return block_ell_linear(
            x, values, o.col_indices, bias, row_group=row_group, backend=backend
        )

    inputs = tuple(t.clone().requires_grad_() for t in (o.x, o.values, o.bias))
    assert torch.autograd.gradcheck(f, inputs)
