"""float32 products as three float16 products, against the float64 reference. Hopper only.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.
"""

from __future__ import annotations

import pytest
import torch

from blockell_format import TransposedIndex
from blockell_kernels import block_ell_linear, explain
from blockell_kernels._gluon import _halves
from blockell_kernels._triton import _forward, _grad_input, _grad_values
from blockell_kernels._triton._tiling import Tiling
from blockell_kernels._triton._tilings_halves import tiling

pytestmark = pytest.mark.skipif(
    not _halves.available(torch.device("cuda", 0)),
    reason="needs a Hopper GPU and Triton 3.6",
)

ACCURACY = 1e-6
"""Relative Frobenius error that IEEE float32 products keep, too."""
PATHS = ("halves", "dense halves")
SHAPES = {
    "tile 8, free rows": {"B": 8, "R": 33, "C": 21, "K": 4, "N": 130},
    "tile 8, grouped": {"B": 8, "R": 32, "C": 19, "K": 7, "N": 70, "G": 16},
    "tile 16, one token": {"B": 16, "R": 8, "C": 5, "K": 2, "N": 1, "G": 8},
    "tile 16": {"B": 16, "R": 16, "C": 37, "K": 11, "N": 129, "G": 8, "spare": 2},
    "tile 16, taller groups": {"B": 16, "R": 48, "C": 21, "K": 9, "N": 200, "G": 24},
    "tile 16, free rows": {"B": 16, "R": 21, "C": 9, "K": 4, "N": 300},
    "tile 32, K = C": {"B": 32, "R": 12, "C": 9, "K": 9, "N": 1025, "G": 4},
    "tile 32, free rows": {"B": 32, "R": 9, "C": 11, "K": 3, "N": 257},
    "tile 64": {"B": 64, "R": 7, "C": 9, "K": 4, "N": 777},
    "tile 64, pairs, spare": {"B": 64, "R": 6, "C": 7, "K": 3, "N": 700, "G": 2, "spare": 1},
    "tile 128, many tokens": {"B": 128, "R": 5, "C": 7, "K": 3, "N": 4099},
    "tile 128, empty columns": {"B": 128, "R": 2, "C": 9, "K": 2, "N": 63},
    "tile 128, long sums": {"B": 128, "R": 3, "C": 64, "K": 48, "N": 140},
}
EXTREME = {"B": 64, "R": 6, "C": 5, "K": 3, "N": 300, "G": 2}
# Powers of ten that differ from line to line; no line helps another one to hide its error.
SPREAD = 12


def way(path: str, name: str, B: int, G: int) -> Tiling:
    alike = B if name == "grad_input" else B * G
    BN = 128 if path == "dense halves" else min(128, alike & -alike)
    return tiling("forward" if name == "y" else name, path, BN)


def products(problem, path: str) -> dict[str, torch.Tensor]:
    """The products that the path can compute, by name."""
    p, found = problem, {}
    ways = {name: way(path, name, p.B, p.G) for name in ("y", "grad_input", "grad_values")}
    if _halves.takes("forward", p.x, p.values, p.pattern, ways["y"]):
        found["y"] = _forward.forward(p.x, p.values, p.bias, p.pattern, ways["y"])
    if _halves.takes("grad_input", p.dy, p.values, p.pattern, ways["grad_input"]):
        found["grad_input"] = _grad_input.grad_input(p.dy, p.values, p.pattern, ways["grad_input"])
    if _halves.takes_gradient(p.dy, p.x, p.pattern, ways["grad_values"]):
        found["grad_values"] = _grad_values.grad_values(p.dy, p.x, p.pattern, ways["grad_values"])
    return found


def lines(result: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    return result.double().cpu().pow(2).sum(dims).sqrt()


def worst_line(actual: torch.Tensor, expected: torch.Tensor, *dims: int) -> float:
    """The largest relative error of a line; `dims` lie inside a line."""
    error = lines(actual.cpu().double() - expected, dims)
    return float((error / lines(expected, dims).clamp_min(1e-300)).max())


@pytest.mark.parametrize("path", PATHS, ids=["blocks", "whole"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_products_are_as_accurate_as_dense(make_problem, error, shape, path):
    problem = make_problem(**shape)
    expected, by_dense = problem.expected(), problem.by_dense()
    found = products(problem, path)
    if path == "dense halves":
        assert set(found) == set(expected)
    for name, actual in found.items():
        assert error(actual, expected[name]) < ACCURACY, name
        # Of one token alone the dense gradient is a rounded product; this one has 22 bits.
        limit = max(1.5 * error(by_dense[name], expected[name]), 2.0**-22)
        assert error(actual, expected[name]) < limit, name
    again = products(problem, path)
    for name, actual in found.items():
        assert torch.equal(actual, again[name]), name
    if "grad_values" in found:
        assert not found["grad_values"][:, problem.K :].any()


@pytest.mark.parametrize("path", PATHS, ids=["blocks", "whole"])
def test_tokens_of_any_size(make_problem, path):
    problem = make_problem(**EXTREME)
    problem.bias.zero_()
    sizes = torch.logspace(-SPREAD, SPREAD, problem.N, device=problem.device)[:, None]
    problem.x *= sizes
    problem.dy *= sizes.flip(0) * 1e-8
    expected, found = problem.expected(), products(problem, path)
    for name in ("y", "grad_input"):
        assert worst_line(found[name], expected[name], 1) < ACCURACY, name


@pytest.mark.parametrize("path", PATHS, ids=["blocks", "whole"])
def test_features_of_any_size(make_problem, path):
    """Every column of x and of dy is a line of the weight's gradient."""
    problem = p = make_problem(**EXTREME)
    p.x *= torch.logspace(-SPREAD, SPREAD, p.C * p.B, device=p.device)
    p.dy *= torch.logspace(SPREAD, -SPREAD, p.R * p.B, device=p.device)
    expected, found = problem.expected()["grad_values"], products(problem, path)["grad_values"]
    assert worst_line(found, expected, 3) < ACCURACY
    assert worst_line(found, expected, 2) < ACCURACY


@pytest.mark.parametrize("path", PATHS, ids=["blocks", "whole"])
def test_weights_of_any_size(make_problem, path):
    problem = p = make_problem(**EXTREME)
    p.bias.zero_()
    p.values *= torch.logspace(-SPREAD, SPREAD, p.R * p.B, device=p.device).view(p.R, 1, p.B, 1)
    assert worst_line(products(problem, path)["y"], problem.expected()["y"], 0) < ACCURACY
    problem = p = make_problem(**EXTREME)
    columns = torch.logspace(-SPREAD, SPREAD, p.C * p.B, device=p.device).view(p.C, p.B)
    p.values *= columns[p.pattern.live.long()][:, :, None, :]
    found, expected = products(problem, path)["grad_input"], problem.expected()["grad_input"]
    assert worst_line(found, expected, 0) < ACCURACY


@pytest.mark.parametrize("path", PATHS, ids=["blocks", "whole"])
@pytest.mark.parametrize("size", [1e-8, 1e-25, 1e-37, 1e25])
def test_small_and_large_operands(make_problem, error, path, size):
    problem = make_problem(**EXTREME)
    problem.bias.zero_()
    problem.x *= size
    problem.dy *= size
    problem.values *= 1.0 if size < 1 else 1e10
    expected, found = problem.expected(), products(problem, path)
    for name in ("y", "grad_input"):
        assert error(found[name], expected[name]) < ACCURACY, name
    if size in (1e-8,):  # else the gradient's own products leave float32
        assert error(found["grad_values"], expected["grad_values"]) < ACCURACY


@pytest.mark.parametrize("path", PATHS, ids=["blocks", "whole"])
def test_denormal_operands_and_zeros(make_problem, error, path):
    problem = p = make_problem(**EXTREME)
    p.bias.zero_()
    p.x *= 1e-39
    p.dy *= 1e-39
    p.x[3] = 0
    p.dy[5] = 0
    p.values *= 1e3
    expected, found = problem.expected(), products(problem, path)
    # Dense products round such sums no better: to 2**-149.
    for name in ("y", "grad_input"):
        assert error(found[name], expected[name]) < 1e-5, name
    assert not found["y"][3].any()
    assert not found["grad_input"][5].any()


@pytest.mark.parametrize("path", PATHS, ids=["blocks", "whole"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_comes_out_as_from_dense(make_problem, path, value):
    problem = p = make_problem(**EXTREME)
    p.x[7, 11], p.x[250, 200] = value, -value
    p.dy[9, 3], p.dy[299, 383] = value, -value
    with_x, expected = products(problem, path), problem.by_dense()
    clean = make_problem(**EXTREME)
    clean.values[2, 1, 5, 6] = value
    with_values, by_dense = products(clean, path), clean.by_dense()
    for found, wanted in ((with_x, expected), (with_values, by_dense)):
        for name, actual in found.items():
            same = torch.isnan(actual) == torch.isnan(wanted[name])
            if path == "halves" and found is with_x and name != "grad_values":
                # The dense product multiplies absent blocks, too: zero times infinity.
                same = torch.isnan(wanted[name]) >= torch.isnan(actual)
            assert bool(same.all()), name
            both = ~(torch.isnan(actual) | torch.isnan(wanted[name]))
            assert torch.equal(torch.isinf(actual)[both], torch.isinf(wanted[name])[both]), name
            assert torch.equal(
                actual[both & torch.isinf(actual)], wanted[name][both & torch.isinf(actual)]
            ), name


@pytest.mark.parametrize("path", PATHS, ids=["blocks", "whole"])
@pytest.mark.parametrize("activation", ["gelu", "silu", "relu"])
def test_activation(make_problem, error, path, activation):
    problem = p = make_problem(**EXTREME)
    ways = way(path, "y", p.B, p.G)
    a, h = _forward.forward_activated(
        p.x, p.values, p.bias, p.pattern, ways, activation, keep_pre=True
    )
    expected = problem.expected()["y"]
    assert error(h, expected) < ACCURACY
    assert error(a, getattr(torch.nn.functional, activation)(expected)) < ACCURACY
    alone = _forward.forward_activated(
        p.x, p.values, p.bias, p.pattern, ways, activation, keep_pre=False
    )
    assert torch.equal(alone[0], a)
    assert alone[1] is None


@pytest.mark.parametrize("path", PATHS, ids=["blocks", "whole"])
@pytest.mark.parametrize("bits", [5, 40])
def test_sizes_that_make_up_for_each_other(make_problem, path, bits):
    """Small weights where x is large, so that all products are of a size, and the same with dy."""
    p = problem = make_problem(**EXTREME)
    p.bias.zero_()
    sizes = torch.exp2(torch.randint(-bits, bits + 1, (p.C, p.B), device=p.device).float())
    p.x *= sizes.view(-1)
    p.values /= sizes[p.pattern.live.long()][:, :, None, :]
    assert worst_line(products(problem, path)["y"], problem.expected()["y"], 1) < ACCURACY
    p = problem = make_problem(**EXTREME)
    sizes = torch.exp2(torch.randint(-bits, bits + 1, (p.R, p.B), device=p.device).float())
    p.dy *= sizes.view(-1)
    p.values /= sizes[:, None, :, None]
    found, expected = products(problem, path)["grad_input"], problem.expected()["grad_input"]
    assert worst_line(found, expected, 1) < ACCURACY


@pytest.mark.parametrize("path", PATHS, ids=["blocks", "whole"])
def test_tokens_that_make_up_for_each_other(make_problem, path):
    """In the weight's gradient: up to 2**12 either way, of which nothing is documented beyond."""
    p = problem = make_problem(**EXTREME)
    sizes = torch.exp2(torch.randint(-6, 7, (p.N, 1), device=p.device).float())
    p.x *= sizes
    p.dy /= sizes
    found, expected = products(problem, path)["grad_values"], problem.expected()["grad_values"]
    assert worst_line(found, expected, 3) < ACCURACY


@pytest.mark.parametrize("path", PATHS, ids=["blocks", "whole"])
def test_operands_it_cannot_take(make_problem, error, path):
    """Not aligned for descriptors, or TF32 is allowed: another kernel runs."""
    problem = p = make_problem(**EXTREME)
    p.x = torch.cat([p.x[:, :1], p.x], 1)[:, 1:]
    ways = way(path, "y", p.B, p.G)
    assert not _halves.takes("forward", p.x, p.values, p.pattern, ways)
    ways = tiling("forward", path, 128, otherwise=Tiling(BM=64, BN=64, BK=32))
    y = _forward.forward(p.x, p.values, p.bias, p.pattern, ways)
    assert error(y, problem.expected()["y"]) < 2e-6
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert not _halves.takes("grad_input", p.dy, p.values, p.pattern, ways)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream:UserWarning")
@pytest.mark.parametrize("shape", ["tile 64", "tile 16, free rows"])
def test_a_step_of_the_operator(make_problem, error, shape):
    """Chosen by itself; captured, it follows new weights."""
    p = make_problem(**SHAPES[shape] | {"N": 1100})
    x, values = p.x.clone().requires_grad_(), p.values.clone().requires_grad_()
    cols, index = p.pattern.col_indices, TransposedIndex(p.pattern.order, p.pattern.col_start)

    def step():
        y = block_ell_linear(x, values, cols, row_group=p.G, index=index, backend="triton")
        return y, *torch.autograd.grad(y, [x, values], p.dy)

    said = explain(x, values, cols, row_group=p.G, backend="triton")
    for choice in said:
        assert "three float16 products" in choice.why
    p.bias.zero_()
    expected = p.expected()
    for name, actual in zip(expected, step(), strict=True):
        assert error(actual, expected[name]) < ACCURACY, name
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        values.copy_(torch.randn_like(values))
    graph.replay()
    for ours, again in zip(captured, step(), strict=True):
        assert torch.equal(ours, again)


def test_explain_where_torch_allows_tf32(make_problem):
    p = make_problem(**EXTREME | {"N": 2048})
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        said = explain(p.x, p.values, p.pattern.col_indices, row_group=p.G, backend="triton")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert "multiplied as TF32" in said.forward.why
