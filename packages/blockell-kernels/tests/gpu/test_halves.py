"""The weight of float32 products as float16 halves.

Legend: R block rows, C block columns, K live blocks per row, B tile side.
"""

from __future__ import annotations

import pytest
import torch

from blockell_kernels._dense import to_dense
from blockell_kernels._triton._halves import split_by_column, split_by_row

SHAPES = {
    "tile 8": {"B": 8, "R": 3, "C": 5, "K": 2, "N": 1},
    "tile 16, spare": {"B": 16, "R": 4, "C": 5, "K": 3, "N": 1, "spare": 1},
    "tile 64, empty columns": {"B": 64, "R": 1, "C": 3, "K": 2, "N": 1},
    "tile 128": {"B": 128, "R": 2, "C": 2, "K": 1, "N": 1},
}
KEPT = 2.0**-22
"""The largest error of a weight, relative to the largest of its row or column."""


def split(problem, by_row: bool, scattered: bool):
    """(the weight as halves and factors say, as it is, the largest of each line, whether lifted).

    All in float64, and divided by the factors that x will be multiplied by.
    """
    p, weight = problem, to_dense(problem.values, problem.pattern).double()
    if by_row:
        found = split_by_row(p.values, p.pattern, scattered)
    else:
        found = split_by_column(p.values, p.pattern, scattered)
    lifted, lifts = bool(found.lifts[0]), found.lifts[1:].double()
    factors = found.factors.double() * 2.0**-14
    if lifted:
        weight = weight / (lifts if by_row else lifts[:, None])
    largest = weight.abs().nan_to_num(0, 0).amax(1 if by_row else 0)
    factors, largest = (t[:, None] if by_row else t for t in (factors, largest))
    factors, largest = factors.expand_as(weight), largest.expand_as(weight)
    if not scattered:
        columns = p.pattern.live.long()[:, None, :, None] * p.B
        columns = columns + torch.arange(p.B, device=p.device)
        columns = columns.expand(p.R, p.B, p.K, p.B).reshape(p.R * p.B, p.K * p.B)
        weight, factors, largest = (t.gather(1, columns) for t in (weight, factors, largest))
        assert not found.halves[:, :, p.K * p.B :].any()
    high, low = found.halves[:, :, : weight.shape[1]].double()
    return (high + low) * factors, weight, largest, lifted


@pytest.mark.parametrize("spread", ["nothing", "rows", "columns"])
@pytest.mark.parametrize("scattered", [False, True], ids=["side by side", "scattered"])
@pytest.mark.parametrize("by_row", [True, False], ids=["by row", "by column"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_halves_keep_the_weight(make_problem, shape, by_row, scattered, spread):
    problem = make_problem(**shape)
    p = problem
    if spread == "rows":
        sizes = torch.logspace(-12, 12, p.R * p.B, device=p.device)
        p.values *= sizes.view(p.R, 1, p.B, 1)
    elif spread == "columns":
        sizes = torch.logspace(-12, 12, p.C * p.B, device=p.device).view(p.C, p.B)
        p.values[:, : p.K] *= sizes[p.pattern.live.long()][:, :, None]
    found, weight, largest, lifted = split(problem, by_row, scattered)
    assert lifted == (spread == ("columns" if by_row else "rows"))
    assert bool(((found - weight).abs() <= KEPT * largest).all())
    zeros = weight == 0
    assert bool((found[zeros] == 0).all())


@pytest.mark.parametrize("by_row", [True, False], ids=["by row", "by column"])
def test_extreme_weights(make_problem, by_row):
    problem = make_problem(**SHAPES["tile 16, spare"])
    line = problem.values[0, :, 0] if by_row else problem.values[0, 0, :, 0]
    for size in (0.0, 1e-45, 1e-38, 3e38):
        line.copy_(line.sign() * size)
        found, weight, largest, _ = split(problem, by_row, True)
        assert bool(((found - weight).abs() <= KEPT * largest).all()), size


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("by_row", [True, False], ids=["by row", "by column"])
def test_what_is_not_finite_is_in_the_low_half(make_problem, by_row, value):
    problem = make_problem(**SHAPES["tile 8"])
    problem.values[1, 0, 3, 4] = value
    p = problem
    if by_row:
        found = split_by_row(p.values, p.pattern, True)
    else:
        found = split_by_column(p.values, p.pattern, True)
    (high, low), weight = found.halves, to_dense(p.values, p.pattern)
    here = ~torch.isfinite(weight)
    assert int(here.sum()) == 1
    assert torch.equal(low[here].float(), torch.tensor([value], device=p.device)) or value != value
    assert torch.equal(torch.isfinite(low), ~here)
    assert bool((high[here] == 0).all())
    assert bool(torch.isfinite(high).all())
