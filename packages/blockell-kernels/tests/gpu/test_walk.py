"""The products that walk the whole weight against the float64 reference, by name.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.
"""

from __future__ import annotations

import pytest
import torch

from blockell_format import transposed_index
from blockell_kernels._triton import BACKEND, _walk, _ways
from blockell_kernels._triton._walk import Walk

CUDA = torch.cuda.is_available()
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = {
    "tile 8": {"B": 8, "R": 9, "C": 11, "K": 5, "N": 33},
    "tile 8 grouped, spare, K = 1": {"B": 8, "R": 8, "C": 9, "K": 1, "N": 3, "G": 4, "spare": 2},
    "tile 16, spare": {"B": 16, "R": 5, "C": 7, "K": 3, "N": 70, "spare": 1},
    "tile 32, K = C": {"B": 32, "R": 3, "C": 3, "K": 3, "N": 20},
    "tile 64, empty columns": {"B": 64, "R": 1, "C": 4, "K": 2, "N": 1},
    "tile 128": {"B": 128, "R": 2, "C": 3, "K": 2, "N": 17},
}
if CUDA:
    SHAPES |= {
        "tile 8, large": {"B": 8, "R": 70, "C": 90, "K": 41, "N": 129},
        "tile 16, large": {"B": 16, "R": 35, "C": 133, "K": 67, "N": 517},
        "tile 32, large": {"B": 32, "R": 33, "C": 17, "K": 9, "N": 4097, "spare": 1},
    }
WALKS = {
    "pointers": Walk(BM=32, BN=64, BK=32, stages=2),
    "boxes": Walk(BM=64, BN=64, BK=32, boxes=True, stages=2),
    "pointers, parts": Walk(BM=16, BN=64, parts=3),
    "boxes, parts": Walk(BM=16, BN=64, BK=16, parts=5, boxes=True, stages=3),
}
# All walks that the rules choose.
if CUDA:
    WALKS |= {
        "deep": Walk(BM=32, BN=64, BK=128, stages=3),
        "wide": Walk(BM=128, BN=128, boxes=True, warps=8),
        "widest": Walk(BM=128, BN=256, boxes=True, warps=8, stages=3),
        "tall": Walk(BM=128, BN=64, parts=2, boxes=True),
    }


def products(problem, walk):
    p = problem
    return {
        "y": _walk.forward(p.x, p.values, p.bias, p.pattern, walk),
        "grad_input": _walk.grad_input(p.dy, p.values, p.pattern, walk),
        "grad_values": _walk.grad_values(p.dy, p.x, p.pattern, walk),
    }


def shuffled(problem):
    """The same with the blocks of every row in another order."""
    K, cols = problem.K, problem.cols
    cols[:, :K] = cols[:, :K].flip(1)
    index, device = transposed_index(cols, problem.C), problem.device
    problem.pattern = problem.pattern._replace(
        col_indices=cols.to(device),
        order=index.order.to(device),
        col_start=index.col_start.to(device),
    )
    return problem


@pytest.mark.parametrize("walk", WALKS.values(), ids=WALKS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_products_match_the_reference(make_problem, error, shape, walk):
    """In bfloat16, as accurate as torch; rows list their columns in any order."""
    problem = shuffled(make_problem(**shape, dtype=BF16))
    expected, by_dense = problem.expected(), problem.by_dense()
    # The interpreter rounds results to bfloat16 towards zero, a GPU to nearest.
    slack = 1.1 if CUDA else 2.5
    for name, actual in products(problem, walk).items():
        assert error(actual, expected[name]) < slack * error(by_dense[name], expected[name]), name
    assert not actual[:, problem.K :].any()  # the weight gradient's spare slots


@pytest.mark.parametrize(("dtype", "limit"), [(FP32, 2e-6), (FP16, 1e-3)])
@pytest.mark.parametrize("walk", ["pointers", "boxes, parts"])
def test_other_dtypes(make_problem, error, walk, dtype, limit):
    problem = make_problem(B=16, R=5, C=7, K=3, N=40, spare=1, dtype=dtype)
    expected = problem.expected()
    for name, actual in products(problem, WALKS[walk]).items():
        assert error(actual, expected[name]) < limit, name


@pytest.mark.parametrize("walk", WALKS.values(), ids=WALKS)
def test_bit_for_bit_deterministic(make_problem, walk):
    problem = make_problem(B=16, R=8, C=9, K=4, N=300 if CUDA else 20, dtype=BF16)
    first, second = products(problem, walk), products(problem, walk)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("walk", WALKS.values(), ids=WALKS)
def test_sliced_operands_are_read_where_they_lie(make_problem, error, walk):
    problem = make_problem(B=32, R=4, C=3, K=2, N=21, dtype=BF16)
    expected = problem.expected()
    for name in ("x", "dy"):
        t = getattr(problem, name)
        setattr(problem, name, torch.cat([t, t], 1)[:, : t.shape[1]])
        assert _walk.takes(getattr(problem, name), problem.x, 32)
    for name, actual in products(problem, walk).items():
        assert error(actual, expected[name]) < 5e-3, name


@pytest.mark.parametrize("layout", ["transposed", "unaligned"])
def test_the_backend_leaves_other_operands_to_other_kernels(
    make_problem, error, monkeypatch, layout
):
    problem = make_problem(B=16, R=4, C=3, K=2, N=21, dtype=BF16)
    walks = _ways.WALK._replace(how=lambda case: WALKS["boxes"])
    monkeypatch.setattr(_ways, "WAYS", (walks, *_ways.WAYS))
    expected = problem.expected()
    for name in ("x", "dy"):
        t = getattr(problem, name)
        if layout == "transposed":
            strided = t.T.contiguous().T
        else:
            strided = torch.cat([t[:, :1], t], 1)[:, 1:]
        assert not _walk.takes(strided, problem.values, 16)
        setattr(problem, name, strided)
    p, q = problem, problem.pattern
    assert error(BACKEND.forward(p.x, p.values, p.bias, q), expected["y"]) < 5e-3
    assert error(BACKEND.grad_input(p.dy, p.values, q), expected["grad_input"]) < 5e-3
    assert error(BACKEND.grad_values(p.dy, p.x, q), expected["grad_values"]) < 5e-3


def test_the_backend_walks_where_the_rule_says_so(make_problem, error, monkeypatch):
    problem = make_problem(B=16, R=4, C=3, K=2, N=21, dtype=BF16)
    p, q, walked = problem, problem.pattern, []
    noted = {
        name: lambda *a, name=name: walked.append(name) or getattr(_walk, name)(*a)
        for name in ("forward", "grad_input", "grad_values")
    }
    walks = _ways.WALK._replace(how=lambda case: WALKS["boxes"], **noted)
    monkeypatch.setattr(_ways, "WAYS", (walks, *_ways.WAYS))
    expected = problem.expected()
    assert error(BACKEND.forward(p.x, p.values, p.bias, q), expected["y"]) < 5e-3
    assert error(BACKEND.grad_input(p.dy, p.values, q), expected["grad_input"]) < 5e-3
    assert error(BACKEND.grad_values(p.dy, p.x, q), expected["grad_values"]) < 5e-3
    assert walked == ["forward", "grad_input", "grad_values"]


def test_not_a_number_reaches_only_the_results_it_should(make_problem):
    """Absent blocks count as zeros here, and zero times infinity is not a number, as in dense."""
    problem = make_problem(B=16, R=4, C=5, K=2, N=18, spare=1, dtype=BF16)
    problem.values[:, 2:] = float("nan")  # spare slots are not read
    problem.x[3, 20] = float("nan")
    actual = products(problem, WALKS["pointers"])
    finite = torch.isfinite(actual["y"])
    assert not finite[3].any()
    finite[3] = True
    assert finite.all()
    assert torch.isfinite(actual["grad_input"]).all()
    assert not actual["grad_values"][:, 2:].any()
