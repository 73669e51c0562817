"""The Gluon kernels against the float64 reference. They run on Hopper only, not in the interpreter.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.
"""

from __future__ import annotations

import pytest
import torch

from blockell_kernels._gluon import _forward as by_pieces
from blockell_kernels._gluon import _grad_input as by_units
from blockell_kernels._gluon import _grad_values as by_items
from blockell_kernels._gluon import _streamed_values as streamed
from blockell_kernels._gluon._support import runs_on
from blockell_kernels._triton import _forward, _grad_input, _grad_values
from blockell_kernels._triton._tiling import Tiling

pytestmark = pytest.mark.skipif(
    not runs_on(torch.empty(0, dtype=torch.bfloat16, device="cuda")),
    reason="needs a Hopper GPU and Triton 3.6",
)

BF16, FP16 = torch.bfloat16, torch.float16
GRAD_INPUT = {
    "256 columns": {"BN": 256, "BK": 64},
    "320 columns": {"BN": 320, "BK": 64},
    "deep": {"BN": 256, "BK": 128},
}
GRAD_VALUES = {
    "192 columns, 3 parts": {"path": "gluon", "BM": 128, "BN": 192, "parts": 3},
    "64 outputs": {"path": "gluon", "BM": 64, "BN": 256, "parts": 2},
    "packed": {"path": "gluon packed", "BM": 128, "BN": 256, "parts": 2},
    "streamed": {"path": "gluon streamed", "BM": 128, "BN": 256},
    "streamed, 64 columns": {"path": "gluon streamed", "BM": 128, "BN": 64},
    "streamed, packed": {"path": "gluon streamed packed", "BM": 128, "BN": 128},
}
SHAPES = {
    "tile 16, one token": {"B": 16, "R": 8, "C": 5, "K": 2, "N": 1, "G": 8},
    "tile 16": {"B": 16, "R": 16, "C": 37, "K": 11, "N": 129, "G": 8},
    "tile 16, K = 1, empty columns": {"B": 16, "R": 8, "C": 33, "K": 1, "N": 63, "G": 8},
    "tile 16, taller groups": {"B": 16, "R": 48, "C": 21, "K": 9, "N": 200, "G": 24},
    "tile 32, K = C": {"B": 32, "R": 12, "C": 9, "K": 9, "N": 1025, "G": 4},
    "tile 32, spare": {"B": 32, "R": 12, "C": 11, "K": 4, "N": 300, "G": 4, "spare": 2},
    "tile 64": {"B": 64, "R": 7, "C": 9, "K": 4, "N": 777},
    "tile 64, pairs": {"B": 64, "R": 6, "C": 7, "K": 3, "N": 7, "G": 2, "spare": 1},
    "tile 64, one row": {"B": 64, "R": 1, "C": 3, "K": 1, "N": 500},
}
# Tiles of other widths, whole ones and cut ones, fewer steps than multiprocessors and more.
WIDE = {
    "tile 128": {"B": 128, "R": 5, "C": 7, "K": 3, "N": 411},
    "tile 128, pairs of blocks": {"B": 128, "R": 12, "C": 5, "K": 4, "N": 700, "spare": 1},
    "tile 64, five blocks": {"B": 64, "R": 6, "C": 10, "K": 5, "N": 1500, "G": 2},
    "tile 64, many rows": {"B": 64, "R": 140, "C": 3, "K": 2, "N": 200},
    "tile 64, ten blocks": {"B": 64, "R": 3, "C": 20, "K": 10, "N": 600},
    "tile 32, ten blocks": {"B": 32, "R": 16, "C": 20, "K": 10, "N": 399, "G": 4},
    "tile 16, twenty blocks": {"B": 16, "R": 16, "C": 40, "K": 20, "N": 500, "G": 8},
}


def grad_input(problem, tiling):
    p = problem
    dx = torch.empty(p.N, p.C * p.B, dtype=p.dtype, device=p.device)
    if not by_units.takes(p.dy, p.values, dx, p.pattern, tiling):
        pytest.skip("the structure does not fit the tiling")
    return _grad_input.grad_input(p.dy, p.values, p.pattern, tiling)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("cut", GRAD_INPUT.values(), ids=GRAD_INPUT)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_grad_input(make_problem, error, shape, cut, dtype):
    problem = make_problem(**shape, dtype=dtype)
    actual = grad_input(problem, Tiling(path="gluon", BM=128, **cut))
    expected = problem.expected()["grad_input"]
    by_dense = problem.by_dense()["grad_input"]
    assert error(actual, expected) <= 1.1 * error(by_dense, expected)
    again = grad_input(problem, Tiling(path="gluon", BM=128, **cut))
    assert torch.equal(actual, again)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("shape", [*SHAPES.values(), *WIDE.values()], ids=[*SHAPES, *WIDE])
def test_grad_values(make_problem, error, shape, dtype):
    problem = make_problem(**shape, dtype=dtype)
    p, tiling = problem, Tiling(path="gluon", BM=128, BN=256, BK=64)
    if not by_items.takes(p.dy, p.x, p.pattern, tiling):
        pytest.skip("too few rows share their columns")
    actual = _grad_values.grad_values(p.dy, p.x, p.pattern, tiling)
    expected, by_dense = p.expected()["grad_values"], p.by_dense()["grad_values"]
    assert error(actual, expected) <= 1.1 * error(by_dense, expected)
    assert not actual[:, p.K :].any()
    again = _grad_values.grad_values(p.dy, p.x, p.pattern, tiling)
    assert torch.equal(actual, again)


@pytest.mark.parametrize("cut", GRAD_VALUES.values(), ids=GRAD_VALUES)
@pytest.mark.parametrize("shape", [*SHAPES.values(), *WIDE.values()], ids=[*SHAPES, *WIDE])
def test_grad_values_in_parts(make_problem, error, shape, cut):
    """Tiles and parts of other sizes; x packed; results that leave while the next ones come."""
    problem = make_problem(**shape, dtype=BF16)
    p, tiling = problem, Tiling(**cut, BK=64)
    if not any(way.takes(p.dy, p.x, p.pattern, tiling) for way in (by_items, streamed)):
        pytest.skip("too few rows share their columns")
    actual = _grad_values.grad_values(p.dy, p.x, p.pattern, tiling)
    expected, by_dense = p.expected()["grad_values"], p.by_dense()["grad_values"]
    assert error(actual, expected) <= 1.1 * error(by_dense, expected)
    assert not actual[:, p.K :].any()
    assert torch.equal(actual, _grad_values.grad_values(p.dy, p.x, p.pattern, tiling))


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("cut", [(64, 64), (128, 128), (192, 128), (256, 64), (320, 128)])
@pytest.mark.parametrize("path", ["gluon", "gluon direct", "gluon packed"])
@pytest.mark.parametrize("shape", [*SHAPES.values(), *WIDE.values()], ids=[*SHAPES, *WIDE])
def test_forward(make_problem, error, shape, path, cut, dtype):
    problem = make_problem(**shape, dtype=dtype)
    p, tiling = problem, Tiling(path=path, BM=cut[0], BN=cut[1], BK=64)
    y = torch.empty(p.N, p.R * p.B, dtype=dtype, device=p.device)
    if not by_pieces.takes(p.x, p.values, y, p.pattern, tiling):
        pytest.skip("too few rows share their columns, or rows of tiles are long enough")
    actual = _forward.forward(p.x, p.values, p.bias, p.pattern, tiling)
    expected, by_dense = p.expected()["y"], p.by_dense()["y"]
    assert error(actual, expected) <= 1.1 * error(by_dense, expected)
    without = _forward.forward(p.x, p.values, None, p.pattern, tiling)
    assert error(without, expected - p.bias.cpu().double()) < 5e-3
    assert torch.equal(actual, _forward.forward(p.x, p.values, p.bias, p.pattern, tiling))


@pytest.mark.parametrize("path", ["gluon", "gluon direct", "gluon packed"])
def test_forward_of_not_finite_tokens(make_problem, path):
    problem = make_problem(**SHAPES["tile 16"], dtype=BF16)
    problem.x[5, 3] = float("nan")
    problem.x[77, 200] = float("inf")
    tiling = Tiling(path=path, BM=128, BN=128, BK=64)
    actual = _forward.forward(problem.x, problem.values, None, problem.pattern, tiling)
    expected = problem.expected()["y"]
    assert torch.equal(torch.isfinite(actual.cpu()), torch.isfinite(expected))


def test_grad_input_of_not_finite_tokens(make_problem):
    problem = make_problem(**SHAPES["tile 16"], dtype=BF16)
    problem.dy[5, 3] = float("nan")
    problem.dy[77, 200] = float("inf")
    actual = grad_input(problem, Tiling(path="gluon", BM=128, BN=256, BK=128))
    expected = problem.expected()["grad_input"]
    assert torch.equal(torch.isfinite(actual.cpu()), torch.isfinite(expected))


def test_operands_it_cannot_take(make_problem, error):
    """Not aligned for descriptors, or rows that share no columns: another kernel runs."""
    tiling = Tiling(path="gluon", BM=128, BN=256, BK=64)
    problem = make_problem(B=32, R=4, C=3, K=2, N=21, G=2, dtype=BF16)
    problem.dy = torch.cat([problem.dy[:, :1], problem.dy], 1)[:, 1:]
    actual = _grad_input.grad_input(problem.dy, problem.values, problem.pattern, tiling)
    assert error(actual, problem.expected()["grad_input"]) < 5e-3
    problem = make_problem(B=16, R=4, C=3, K=2, N=21, dtype=BF16)
    actual = _grad_input.grad_input(problem.dy, problem.values, problem.pattern, tiling)
    assert error(actual, problem.expected()["grad_input"]) < 5e-3
