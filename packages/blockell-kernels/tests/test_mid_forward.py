"""How the forward product is cut at middle token counts: a model of the time says."""

from __future__ import annotations

import pytest
import torch

from blockell_kernels._backends import Case

pytest.importorskip("triton")
from blockell_kernels._triton import _mid_forward as middle
from blockell_kernels._triton import _tilings

pytestmark = pytest.mark.usefixtures("pretended_hopper")


def case(N, shape, B, G, density=0.5):
    R, C = shape[1] // B, shape[0] // B
    device = torch.device("cuda", 0)
    return Case("forward", device, torch.bfloat16, N, R, C, max(1, round(density * C)), B, G)


def test_tiles_fill_whole_rounds():
    """777 tokens of 3072 outputs: 120 tiles of 192 x 128 for 132 multiprocessors."""
    tiling = middle.tiling_for(case(777, (2048, 3072), 128, 1))
    assert (tiling.path, tiling.BM, tiling.BN) == ("gluon", 192, 128)


def test_outputs_of_a_tile_share_their_columns():
    for N in (65, 200, 511):
        assert middle.tiling_for(case(N, (2560, 640), 64, 1)).BN == 64


def test_a_product_takes_longer_the_more_there_is_to_it():
    for cut in ((64, 64), (192, 128), (320, 128)):
        for B, G, path in ((128, 1, "gluon"), (32, 4, "gluon direct"), (16, 8, "gluon packed")):
            cases = [case(N, (640, 2560), B, G) for N in range(65, 4000, 37)]
            times = [middle.product_us(c, path, *cut) for c in cases]
            assert times == sorted(times)


@pytest.mark.parametrize(
    ("N", "shape", "path"),
    [
        (777, (2048, 3072), "gluon packed"),  # every column is read by half of 24 groups
        (2048, (2560, 640), "gluon"),  # a weight smaller than x
        (320, (640, 2560), "gluon direct"),  # too short for a launch before it
    ],
)
def test_short_lines_are_copied_where_that_pays(N, shape, path):
    assert middle.tiling_for(case(N, shape, 16, 8)).path == path


def test_x_is_packed_for_long_sums_of_many_outputs_at_any_number_of_tokens():
    """Gathering 16 columns at a time takes longer than multiplying; each is read by many groups."""
    paths = [
        _tilings.tiling_for(case(8192, shape, 16, 8)).path
        for shape in ((4096, 14336), (14336, 4096), (640, 2560), (2560, 640))
    ]
    assert paths == ["gluon packed", "packed", "gluon", "gluon"]


def test_long_sums_of_few_results_are_left_to_others():
    for N, shape in ((128, (2560, 640)), (4096, (3072, 768))):
        assert middle.tiling_for(case(N, shape, 16, 8)) is None
    assert middle.tiling_for(case(4096, (3072, 768), 32, 4)).path == "gluon direct"
    assert middle.tiling_for(case(777, (640, 2560), 16, 1)) is None


def test_short_sums_and_small_weights_are_left_to_others():
    assert middle.tiling_for(case(777, (2048, 3072), 128, 1, 0.2)) is None
    assert middle.tiling_for(case(2048, (640, 2560), 64, 2)) is None
    assert middle.tiling_for(case(256, (640, 2560), 32, 4)) is None


def test_few_tokens_and_narrow_groups_are_left_to_others():
    assert middle.tiling_for(case(64, (640, 2560), 128, 1)) is None
    assert middle.tiling_for(case(512, (640, 2560), 64, 1)) is None


def test_there_is_one_behind_it_for_operands_that_it_does_not_take():
    tiling = _tilings.tiling_for(case(777, (2048, 3072), 128, 1))
    assert tiling.path == "gluon"
    assert tiling.otherwise.path == "descriptors"
