"""The products of few tokens against the float64 reference, by name.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.
"""

from __future__ import annotations

import pytest
import torch

from blockell_kernels._backends import Case
from blockell_kernels._triton import _few_tokens
from blockell_kernels._triton._few_tokens import Strip

CUDA = torch.cuda.is_available()
SHAPES = {
    "tile 8": {"B": 8, "R": 4, "C": 5, "K": 3, "N": 1},
    "tile 8 grouped, spare": {"B": 8, "R": 8, "C": 6, "K": 2, "N": 17, "G": 4, "spare": 1},
    "tile 16": {"B": 16, "R": 3, "C": 5, "K": 4, "N": 5},
    "tile 16, K = 1, spare": {"B": 16, "R": 5, "C": 3, "K": 1, "N": 7, "spare": 2},
    "tile 16, many columns": {"B": 16, "R": 2, "C": 12, "K": 7, "N": 2},
    "tile 16 grouped by 3": {"B": 16, "R": 6, "C": 5, "K": 2, "N": 9, "G": 3},
    "tile 32 grouped, spare": {"B": 32, "R": 4, "C": 3, "K": 2, "N": 20, "G": 4, "spare": 1},
    "tile 64, empty columns": {"B": 64, "R": 1, "C": 5, "K": 2, "N": 64},
    "tile 128": {"B": 128, "R": 1, "C": 3, "K": 2, "N": 3},
    "tile 16, two tiles of tokens": {"B": 16, "R": 2, "C": 3, "K": 2, "N": 70},
}
if CUDA:
    SHAPES |= {
        "tile 8, large": {"B": 8, "R": 70, "C": 90, "K": 41, "N": 33},
        "tile 16, large": {"B": 16, "R": 35, "C": 133, "K": 67, "N": 64},
        "tile 64, 500 tokens": {"B": 64, "R": 3, "C": 5, "K": 2, "N": 500},
        "tile 128, large": {"B": 128, "R": 9, "C": 17, "K": 11, "N": 31},
    }
STRIPS = {
    "one part": Strip(BN=32, BK=64, stages=2),
    "parts": Strip(BN=16, BK=16, parts=3, stages=2),
    "deep": Strip(BN=64, BK=128, parts=2, stages=3),
}


def products(problem, strips):
    p, (forward, grad_input, grad_values) = problem, strips
    return {
        "y": _few_tokens.forward(p.x, p.values, p.bias, p.pattern, forward),
        "grad_input": _few_tokens.grad_input(p.dy, p.values, p.pattern, grad_input),
        "grad_values": _few_tokens.grad_values(p.dy, p.x, p.pattern, grad_values),
    }


def strips_of(problem):
    p = problem
    sizes = (p.N, p.R, p.C, p.K, p.B, p.G)
    directions = ("forward", "grad_input", "grad_values")
    strips = [_few_tokens.strip_for(Case(d, p.device, p.dtype, *sizes)) for d in directions]
    return [strip or STRIPS["one part"] for strip in strips]


SOME = ("tile 8 grouped, spare", "tile 16, many columns")
SMALL = ("tile 8", *SOME, "tile 16, K = 1, spare", "tile 32 grouped, spare")
CASES = [(s, k) for s in SHAPES for k in STRIPS if CUDA or (k == "parts" and s in SMALL)]


@pytest.mark.parametrize(("shape", "strip"), CASES)
def test_products_match_the_reference(make_problem, error, shape, strip):
    problem = make_problem(**SHAPES[shape])
    expected = problem.expected()
    for name, actual in products(problem, [STRIPS[strip]] * 3).items():
        assert error(actual, expected[name]) < 2e-6, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES if CUDA else SOME[:1])
def test_with_the_strips_that_are_chosen(make_problem, error, shape, dtype):
    problem = make_problem(**SHAPES[shape], dtype=dtype)
    expected, by_dense = problem.expected(), problem.by_dense()
    # The interpreter rounds results to bfloat16 towards zero, a GPU to nearest.
    slack = 2.5 if dtype == torch.bfloat16 and not CUDA else 1.1
    for name, actual in products(problem, strips_of(problem)).items():
        limit = slack * error(by_dense[name], expected[name])
        assert error(actual, expected[name]) < max(limit, 2e-6), name


def test_strided_operands_and_determinism(make_problem, error):
    problem = make_problem(B=16, R=4, C=7, K=3, N=11)
    expected = problem.expected()
    problem.x, problem.dy = problem.x.T.contiguous().T, problem.dy.T.contiguous().T
    strips = [STRIPS["parts"]] * 3
    first, second = products(problem, strips), products(problem, strips)
    for name, actual in first.items():
        assert error(actual, expected[name]) < 2e-6, name
        assert torch.equal(actual, second[name]), name


def test_not_a_number_reaches_only_the_results_it_should(make_problem):
    """Spare slots get zeros, padded tokens nothing, whatever the operands hold."""
    problem = make_problem(B=16, R=2, C=4, K=2, N=5, spare=1)
    problem.dy[:] = float("nan")
    actual = products(problem, [STRIPS["one part"]] * 3)
    assert not actual["grad_values"][:, 2:].any()
    assert torch.isfinite(actual["y"]).all()
