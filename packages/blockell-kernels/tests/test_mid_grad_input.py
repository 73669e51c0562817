"""How the input gradient is cut at middle token counts: a model of the time says."""

from __future__ import annotations

import itertools

import pytest
import torch

from blockell_kernels._backends import Case

pytest.importorskip("triton")
from blockell_kernels._triton import _mid_grad_input as middle
from blockell_kernels._triton import _tilings

pytestmark = pytest.mark.usefixtures("pretended_hopper")

SHARED_BYTES, REGISTERS = 227 * 1024, 65536


def case(N, shape, B, G, density=0.5):
    R, C = shape[1] // B, shape[0] // B
    device = torch.device("cuda", 0)
    return Case("grad_input", device, torch.bfloat16, N, R, C, max(1, round(density * C)), B, G)


@pytest.mark.parametrize(
    "tile", {tile for tiles in middle.TILES.values() for tile in tiles}, ids=str
)
def test_a_multiprocessor_holds_as_many_programs_as_the_model_says(tile):
    loads = (tile.tokens + tile.columns) * tile.depth * 2 * tile.stages
    assert tile.resident * loads <= SHARED_BYTES
    sums = tile.tokens * max(16, tile.columns) // 128
    assert tile.resident * (sums + 40) * 128 <= REGISTERS


def test_few_tiles_share_a_column_between_programs():
    """100 tokens of 640 columns: 20 tiles of 64 x 64."""
    assert middle.tiling_for(case(100, (640, 2560), 128, 1)).parts > 1
    assert middle.tiling_for(case(4096, (4096, 4096), 128, 1)).parts == 1


def test_parts_have_steps_to_work_off_and_memory_for_their_sums():
    shapes = [(640, 2560), (2560, 640), (128, 128), (4096, 14336)]
    for N, shape, B, density in itertools.product((65, 200, 999), shapes, (64, 128), (0.1, 1.0)):
        asked = case(N, shape, B, 128 // B, density)
        tiling = middle.tiling_for(asked)
        assert N * shape[0] * tiling.parts <= max(N * shape[0], middle.MOST_SUMMED)
        mean = asked.R * asked.density * B / tiling.BK
        assert tiling.parts <= 1 or mean / tiling.parts >= middle.FEWEST_STEPS


def test_a_step_stays_within_the_rows_that_share_their_columns():
    for N in (33, 100, 500, 777, 2048, 6000):
        for B, G in ((64, 1), (64, 2), (32, 4), (16, 8)):
            tiling = middle.tiling_for(case(N, (640, 2560), B, G))
            assert tiling is None or tiling.BK <= B * G


def test_programs_by_units_own_two_block_columns_or_more():
    densities = (0.1, 0.25, 0.5, 0.75, 1.0)
    for N, B, density in itertools.product(range(100, 8000, 170), (16, 32, 64), densities):
        tiling = middle.tiling_for(case(N, (2048, 3072), B, 128 // B, density))
        assert tiling is None or tiling.path != "gluon" or tiling.BN >= 2 * B


def test_a_product_takes_longer_the_more_tokens_there_are():
    for tile in middle.WIDE:
        times = [
            middle.tile_cost(case(N, (640, 2560), 64, 2), tile, 1).us for N in range(33, 4000, 64)
        ]
        assert all(later > 0.99 * earlier for earlier, later in itertools.pairwise(times))


def test_what_is_not_modelled_is_left_to_others():
    assert middle.tiling_for(case(middle.FEWEST, (4096, 4096), 128, 1)) is None
    assert middle.tiling_for(case(64, (640, 2560), 128, 1)) is None
    assert middle.tiling_for(case(32, (2560, 640), 128, 1)) is None
    assert middle.tiling_for(case(middle.FEWEST_OF_SMALL, (640, 2560), 16, 8)) is None
    assert middle.tiling_for(case(777, (640, 2560), 8, 16)) is None
    assert middle.tiling_for(case(777, (640, 2560), 16, 1)) is None
    assert middle.tiling_for(case(2048, (640, 2560), 16, 8)) is None


def test_there_is_one_behind_it_for_operands_that_it_does_not_take():
    for N in (512, 1024, 2048, 4096):
        tiling = _tilings.tiling_for(case(N, (4096, 14336), 64, 2))
        assert tiling.path != "gluon" or tiling.otherwise.path == "descriptors"
