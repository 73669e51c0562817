"""Scatter, gather, block norms and block sums against their definitions.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.
"""

from __future__ import annotations

import pytest
import torch

from blockell_format import transposed_index
from blockell_kernels import _dense, _reference
from blockell_kernels._triton import BACKEND, _blocks

SHAPES = [
    {"B": 8, "R": 3, "C": 5, "K": 2, "N": 7},
    {"B": 16, "R": 5, "C": 19, "K": 3, "N": 33, "spare": 2},
    {"B": 32, "R": 3, "C": 3, "K": 3, "N": 1},
    {"B": 64, "R": 2, "C": 3, "K": 1, "N": 63},
    {"B": 128, "R": 1, "C": 2, "K": 1, "N": 9, "spare": 1},
]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scatter_writes_every_element(make_problem, shape, dtype):
    problem = make_problem(**shape, dtype=dtype)
    dense = _blocks.to_dense(problem.values, problem.pattern)
    assert torch.equal(dense, _dense.to_dense(problem.values, problem.pattern))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_large_weights_are_written_once(make_problem, monkeypatch, shape):
    monkeypatch.setitem(_blocks._LARGE_WEIGHT, shape["B"], 0)
    problem = make_problem(**shape, dtype=torch.bfloat16)
    problem.values[:, shape["K"] :] = float("nan")
    dense = _blocks.to_dense(problem.values, problem.pattern)
    assert torch.equal(dense, _dense.to_dense(problem.values.cpu(), on_cpu(problem)).to(dense))


def on_cpu(problem):
    return problem.pattern._replace(col_indices=problem.cols)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gather_undoes_scatter_and_zeroes_spare_slots(make_problem, shape):
    problem = make_problem(**shape)
    dense = torch.randn(shape["R"] * shape["B"], shape["C"] * shape["B"], device=problem.device)
    blocks = _blocks.from_dense(dense, problem.pattern)
    assert not blocks[:, shape["K"] :].any()
    mask = _blocks.to_dense(torch.ones_like(problem.values), problem.pattern)
    assert torch.equal(_blocks.to_dense(blocks, problem.pattern), dense * mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_block_grad_norms(make_problem, error, shape, dtype):
    problem = make_problem(**shape, dtype=dtype)
    x, dy, _, _ = problem.operands64
    expected = _reference.block_grad_norms(dy, x, shape["B"]).square()
    actual = BACKEND.block_grad_norms(problem.dy, problem.x, shape["B"])
    assert actual.dtype == torch.float32
    assert error(actual, expected) < 3e-6


def test_block_grad_norms_of_strided_operands(make_problem, error):
    problem = make_problem(B=16, R=3, C=5, K=2, N=21)
    x, dy, _, _ = problem.operands64
    expected = _reference.block_grad_norms(dy, x, 16).square()
    actual = _blocks.block_norms_sq(problem.dy.T.contiguous().T, problem.x.T.contiguous().T, 16)
    assert error(actual, expected) < 3e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_block_sums(make_problem, error, shape, dtype):
    problem = make_problem(**shape, dtype=dtype)
    expected = problem.operands64[0].square().sum(0).unflatten(0, (-1, shape["B"])).sum(1)
    assert error(_blocks.block_sums_sq(problem.x, shape["B"]), expected) < 1e-6


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_transposed_index_in_one_launch(make_problem, shape):
    problem = make_problem(**shape)
    order, col_start = _blocks.transposed(problem.pattern.col_indices, shape["C"])
    expected = transposed_index(problem.cols, shape["C"])
    assert torch.equal(order.cpu(), expected.order)
    assert torch.equal(col_start.cpu(), expected.col_start)
    assert order.dtype == col_start.dtype == torch.int32
