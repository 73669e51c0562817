"""Every product against the float64 reference, by name, on both load paths.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.
"""

from __future__ import annotations

import pytest
import torch

from blockell_kernels._triton import BACKEND, _forward, _grad_input, _grad_values
from blockell_kernels._triton._device import dot_precision
from blockell_kernels._triton._tiling import Tiling

CUDA = torch.cuda.is_available()
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# By these tilings float32 is multiplied as 3xTF32 on a GPU: accurate, in another order.
FP32_TOLERANCE = 2e-6
SMALL = {"BM": 16, "BN": 32, "BK": 16}
TILINGS = {
    "pointers": Tiling(**SMALL),
    "pointers-deep": Tiling(BM=32, BN=128, BK=64, warps=8),
    "descriptors": Tiling(path="descriptors", **SMALL),
    "parts": Tiling(path="descriptors", parts=3, **SMALL),
    "packed": Tiling(path="packed", BM=16, BN=64, BK=32, store_parts=2),
    "persistent": Tiling(path="descriptors", persistent=1, store_parts=2, BM=16, BN=128, BK=32),
}
SHAPES = {
    "tile 8": {"B": 8, "R": 4, "C": 5, "K": 3, "N": 7},
    "tile 8 grouped, spare": {"B": 8, "R": 4, "C": 3, "K": 2, "N": 17, "G": 4, "spare": 1},
    "tile 16, one token": {"B": 16, "R": 3, "C": 5, "K": 2, "N": 1},
    "tile 16, K = 1, spare": {"B": 16, "R": 5, "C": 3, "K": 1, "N": 7, "spare": 2},
    "tile 16, K = C": {"B": 16, "R": 3, "C": 3, "K": 3, "N": 33},
    "tile 16 grouped": {"B": 16, "R": 8, "C": 7, "K": 3, "N": 63, "G": 8},
    "tile 16 grouped by 3": {"B": 16, "R": 6, "C": 5, "K": 2, "N": 9, "G": 3},
    "tile 32 grouped, spare": {"B": 32, "R": 4, "C": 3, "K": 2, "N": 40, "G": 4, "spare": 1},
    "tile 64 grouped": {"B": 64, "R": 2, "C": 3, "K": 2, "N": 17, "G": 2},
    "tile 16, many columns": {"B": 16, "R": 2, "C": 40, "K": 3, "N": 5},
    "tile 64, empty columns": {"B": 64, "R": 1, "C": 5, "K": 2, "N": 9},
    "tile 128": {"B": 128, "R": 1, "C": 3, "K": 1, "N": 20},
}
if CUDA:
    SHAPES |= {
        "odd": {"B": 16, "R": 35, "C": 33, "K": 11, "N": 129},
        "tile 32, long": {"B": 32, "R": 12, "C": 9, "K": 5, "N": 4097, "G": 4, "spare": 1},
        "tile 64, long": {"B": 64, "R": 6, "C": 7, "K": 3, "N": 4097, "G": 2},
        "tile 128, long": {"B": 128, "R": 5, "C": 7, "K": 3, "N": 4097},
    }


def products(problem, tiling: Tiling) -> dict[str, torch.Tensor]:
    p = problem
    return {
        "y": _forward.forward(p.x, p.values, p.bias, p.pattern, tiling),
        "grad_input": _grad_input.grad_input(p.dy, p.values, p.pattern, tiling),
        "grad_values": _grad_values.grad_values(p.dy, p.x, p.pattern, tiling),
    }


@pytest.mark.parametrize("tiling", TILINGS.values(), ids=TILINGS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_products_match_the_reference(make_problem, error, shape, tiling):
    problem = make_problem(**shape)
    expected = problem.expected()
    for name, actual in products(problem, tiling).items():
        assert error(actual, expected[name]) < FP32_TOLERANCE, name


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("tiling", TILINGS.values(), ids=TILINGS)
@pytest.mark.parametrize("name", ["tile 16 grouped", "tile 32 grouped, spare", "tile 64 grouped"])
def test_half_precision_is_as_accurate_as_torch(make_problem, error, name, tiling, dtype):
    problem = make_problem(**SHAPES[name], dtype=dtype)
    expected, by_dense = problem.expected(), problem.by_dense()
    # The interpreter rounds results to bfloat16 towards zero, a GPU to nearest.
    slack = 2.5 if dtype == BF16 and not CUDA else 1.1
    for name, actual in products(problem, tiling).items():
        assert error(actual, expected[name]) < slack * error(by_dense[name], expected[name]), name


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_backend_with_the_tilings_it_ships(make_problem, error, shape, dtype):
    problem = make_problem(**shape, dtype=dtype)
    p, expected = problem, problem.expected()
    tolerance = FP32_TOLERANCE if dtype == FP32 else 5e-3
    y = BACKEND.forward(p.x, p.values, p.bias, p.pattern)
    assert error(y, expected["y"]) < tolerance
    y = BACKEND.forward(p.x, p.values, None, p.pattern)
    assert error(y, expected["y"] - p.bias.cpu().double()) < tolerance
    assert error(BACKEND.grad_input(p.dy, p.values, p.pattern), expected["grad_input"]) < tolerance
    assert error(BACKEND.grad_values(p.dy, p.x, p.pattern), expected["grad_values"]) < tolerance


@pytest.mark.parametrize("tiling", TILINGS.values(), ids=TILINGS)
@pytest.mark.parametrize("layout", ["transposed", "sliced", "unaligned"])
def test_strided_operands(make_problem, error, tiling, layout):
    problem = make_problem(B=32, R=4, C=3, K=2, N=21, G=2)
    expected = problem.expected()
    for name in ("x", "dy"):
        t = getattr(problem, name)
        if layout == "transposed":
            strided = t.T.contiguous().T
        elif layout == "sliced":
            strided = torch.cat([t, t], 1)[:, : t.shape[1]]
        else:
            strided = torch.cat([t[:, :1], t], 1)[:, 1:]
        assert torch.equal(strided, t)
        assert not strided.is_contiguous()
        setattr(problem, name, strided)
    for name, actual in products(problem, tiling).items():
        assert error(actual, expected[name]) < FP32_TOLERANCE, name


@pytest.mark.parametrize("tiling", TILINGS.values(), ids=TILINGS)
def test_no_tokens(make_problem, tiling):
    problem = make_problem(B=16, R=2, C=3, K=2, N=0, spare=1)
    actual = products(problem, tiling)
    assert actual["y"].shape == (0, 32)
    assert actual["grad_input"].shape == (0, 48)
    assert torch.equal(actual["grad_values"], torch.zeros_like(problem.values))


def test_columns_that_no_row_holds_get_zero_gradients(make_problem):
    problem = make_problem(B=16, R=2, C=6, K=1, N=5)
    held = set(problem.cols.flatten().tolist())
    for tiling in TILINGS.values():
        dx = products(problem, tiling)["grad_input"].unflatten(1, (6, 16))
        for c in range(6):
            assert bool((dx[:, c] != 0).any()) == (c in held)


@pytest.mark.parametrize("tiling", TILINGS.values(), ids=TILINGS)
def test_bit_for_bit_deterministic(make_problem, tiling):
    N = 5000 if CUDA else 20
    problem = make_problem(B=32, R=4, C=3, K=2, N=N, G=2, dtype=BF16)
    first, second = products(problem, tiling), products(problem, tiling)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("path", ["pointers", "descriptors"])
def test_tokens_split_over_programs(make_problem, error, path):
    """Parts of the tokens are summed; the last part is shorter; spare slots get zeros."""
    problem = make_problem(B=32, R=2, C=3, K=2, N=1111 if CUDA else 300, G=2, spare=1)
    p = problem
    tiling = Tiling(path=path, BM=64, BN=64, BK=32, waves=8)
    actual = _grad_values.grad_values(p.dy, p.x, p.pattern, tiling)
    assert error(actual, p.expected()["grad_values"]) < FP32_TOLERANCE
    assert not actual[:, p.K :].any()


@pytest.mark.parametrize("tiling", TILINGS.values(), ids=TILINGS)
def test_nan_and_inf_propagate_as_in_dense(make_problem, tiling):
    problem = make_problem(B=16, R=4, C=5, K=2, N=18, G=2)
    problem.x[3, 20] = float("nan")
    problem.x[17, 40] = float("inf")
    y = _forward.forward(problem.x, problem.values, problem.bias, problem.pattern, tiling)
    expected = problem.expected()["y"]
    assert torch.equal(torch.isfinite(y.cpu()), torch.isfinite(expected))


@pytest.fixture
def tf32_allowed():
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.usefixtures("tf32_allowed")
def test_tf32_where_torch_allows_it(make_problem, error):
    problem = make_problem(B=32, R=4, C=3, K=2, N=40, G=2)
    expected = problem.expected()
    assert dot_precision(torch.float32, problem.device) == "tf32"
    for name, actual in products(problem, TILINGS["pointers"]).items():
        assert error(actual, expected[name]) < 1e-3, name


def test_float32_accuracy_by_default(make_problem):
    assert dot_precision(torch.float32, make_problem(B=8, R=1, C=1, K=1, N=1).device) == "tf32x3"
