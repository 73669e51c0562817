"""Where blocks are noted to lie, against loops.

Legend: R block rows, C block columns, K live blocks per row, B tile side.
"""

from __future__ import annotations

import pytest

from blockell_kernels._triton._places import STEP, UNIT, places_of

SHAPES = {
    "tile 16, spare": {"B": 16, "R": 9, "C": 13, "K": 5, "spare": 2},
    "tile 32, K = C": {"B": 32, "R": 3, "C": 2, "K": 2},
    "tile 64, K = 1": {"B": 64, "R": 5, "C": 3, "K": 1},
    "tile 128": {"B": 128, "R": 5, "C": 3, "K": 2, "spare": 1},
    "tile 16, many columns": {"B": 16, "R": 2, "C": 300, "K": 270},
}


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_block_is_noted_once(make_problem, shape, forward):
    p = make_problem(**shape, N=1)
    table, units, steps = places_of(p.pattern, forward)
    across, along, slots = UNIT // p.B, max(STEP, p.B) // p.B, p.K + shape.get("spare", 0)
    assert table.shape == (units, steps, across, along)
    expected = table.new_full(table.shape, p.R * slots * p.B)
    for r in range(p.R):
        for k in range(p.K):
            out, deep = (r, int(p.cols[r, k])) if forward else (int(p.cols[r, k]), r)
            at = out // across, deep // along, out % across, deep % along
            expected[at] = (r * slots + k) * p.B
    assert table.equal(expected)
