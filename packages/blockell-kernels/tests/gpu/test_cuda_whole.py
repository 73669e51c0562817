"""Products by the whole weight, block by block, against the float64 reference. Hopper only.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.
"""

from __future__ import annotations

import pytest
import torch

from blockell_kernels._gluon import _whole, _whole_values
from blockell_kernels._gluon._support import runs_on
from blockell_kernels._gluon._whole import Cut

pytestmark = pytest.mark.skipif(
    not runs_on(torch.empty(0, dtype=torch.bfloat16, device="cuda")),
    reason="needs a Hopper GPU and Triton 3.6",
)

BF16, FP16 = torch.bfloat16, torch.float16
SHAPES = {
    "tile 16, one token": {"B": 16, "R": 8, "C": 5, "K": 2, "N": 1},
    "tile 16, spare": {"B": 16, "R": 37, "C": 23, "K": 11, "N": 129, "spare": 2},
    "tile 16, K = 1, empty columns": {"B": 16, "R": 3, "C": 133, "K": 1, "N": 63},
    "tile 16, grouped": {"B": 16, "R": 48, "C": 21, "K": 9, "N": 1000, "G": 24},
    "tile 32, K = C": {"B": 32, "R": 13, "C": 9, "K": 9, "N": 1025},
    "tile 32, many rows": {"B": 32, "R": 301, "C": 7, "K": 4, "N": 300, "spare": 1},
    "tile 64": {"B": 64, "R": 7, "C": 9, "K": 4, "N": 777},
    "tile 64, one block": {"B": 64, "R": 1, "C": 1, "K": 1, "N": 7},
    "tile 128": {"B": 128, "R": 5, "C": 7, "K": 3, "N": 411, "spare": 1},
    "tile 128, K = C": {"B": 128, "R": 6, "C": 4, "K": 4, "N": 1300},
    "tile 64, long sums": {"B": 64, "R": 70, "C": 66, "K": 40, "N": 4097},
}
CUTS = [Cut(2, 1), Cut(4, 1), Cut(5, 1), Cut(2, 3), Cut(5, 2)]


def product(problem, name, bias=None, cut=None):
    p, forward = problem, name == "y"
    a = p.x if forward else p.dy
    assert _whole.takes(a, p.values, p.B)
    return _whole.product(a, p.values, bias, p.pattern, forward, cut)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("name", ["y", "grad_input"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_products_match_the_reference(make_problem, error, shape, name, dtype):
    """As accurate as torch's dense product, however cut, and the same bits at every call."""
    problem = make_problem(**shape, dtype=dtype)
    expected, by_dense = problem.expected()[name], problem.by_dense()[name]
    bias = problem.bias if name == "y" else None
    for cut in [None, *CUTS]:
        actual = product(problem, name, bias, cut)
        assert error(actual, expected) <= 1.1 * error(by_dense, expected), cut
        assert torch.equal(actual, product(problem, name, bias, cut)), cut


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_grad_values_match_the_reference(make_problem, error, shape, dtype):
    p = make_problem(**shape, dtype=dtype)
    assert _whole.takes(p.dy, p.x, p.B)
    actual = _whole_values.grad_values(p.dy, p.x, p.pattern)
    expected, by_dense = p.expected()["grad_values"], p.by_dense()["grad_values"]
    assert error(actual, expected) <= 1.1 * error(by_dense, expected)
    assert not actual[:, p.K :].any()
    assert torch.equal(actual, _whole_values.grad_values(p.dy, p.x, p.pattern))


@pytest.mark.parametrize("name", ["y", "grad_input"])
def test_rows_of_other_tensors(make_problem, error, name):
    """Operands whose rows lie apart are read in place; a forward product without bias."""
    problem = make_problem(B=32, R=12, C=10, K=5, N=200, dtype=BF16)
    expected = problem.expected()[name]
    if name == "y":
        expected = expected - problem.bias.cpu().double()
    problem.x = torch.cat([problem.x, problem.x], 1)[:, : problem.x.shape[1]]
    problem.dy = torch.cat([problem.dy, problem.dy], 1)[:, : problem.dy.shape[1]]
    assert error(product(problem, name), expected) < 5e-3


def test_operands_it_cannot_take(make_problem):
    problem = make_problem(B=16, R=4, C=3, K=2, N=21, dtype=BF16)
    shifted = torch.cat([problem.x[:, :1], problem.x], 1)[:, 1:]
    assert not _whole.takes(shifted, problem.values, 16)
    assert not _whole.takes(problem.x.float(), problem.values.float(), 16)
    assert not _whole.takes(problem.x, problem.values, 8)


def test_not_finite_tokens_stay_where_they_are(make_problem):
    problem = make_problem(B=16, R=30, C=20, K=9, N=200, dtype=BF16)
    problem.x[5, 3] = float("nan")
    problem.x[77, 200] = float("inf")
    actual = product(problem, "y").isfinite().all(1)
    assert actual.sum() == 198
    assert not actual[5]
    assert not actual[77]
