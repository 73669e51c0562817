"""How the weight gradient is cut at middle token counts: a model of the time says."""

from __future__ import annotations

import pytest
import torch

from blockell_kernels._backends import Case

pytest.importorskip("triton")
from blockell_kernels._triton import _mid_grad_values as middle
from blockell_kernels._triton import _tilings

pytestmark = pytest.mark.usefixtures("pretended_hopper")

STRUCTURES = [(128, 1), (64, 2), (64, 1), (32, 4), (16, 8)]
SHARED_BYTES = 227 * 1024


def case(N, shape, B, G, density=0.5):
    R, C = shape[1] // B, shape[0] // B
    device = torch.device("cuda", 0)
    return Case("grad_values", device, torch.bfloat16, N, R, C, max(1, round(density * C)), B, G)


def test_a_small_weight_is_not_split_while_sums_are_short():
    """2048 tokens of 640 -> 2560: 80 tiles of 64 x 128 take less than 20 times 6 parts."""
    tiling = middle.tiling_for(case(2048, (640, 2560), 128, 1))
    assert (tiling.BM * tiling.BN, tiling.parts) == (64 * 128, 1)


def test_many_blocks_are_stored_while_others_are_multiplied():
    for B, G in STRUCTURES:
        tiling = middle.tiling_for(case(256, (4096, 14336), B, G))
        assert "streamed" in tiling.path
        assert tiling.otherwise.path == ("pointers" if B < 64 else "descriptors")


def test_cuts_fit_their_structure():
    for B, G in STRUCTURES:
        for N in (65, 300, 777, 2048, 6000):
            for shape in ((640, 2560), (2560, 640), (14336, 4096)):
                for density in (0.1, 0.5, 1.0):
                    tiling = middle.tiling_for(case(N, shape, B, G, density))
                    plain = tiling.otherwise or tiling
                    assert B * G % plain.BM == 0
                    assert plain.path == "pointers" or plain.BN in (B, 2 * B)
                    loads = (plain.BM + plain.BN) * plain.BK * 2 * plain.stages
                    assert loads <= SHARED_BYTES


@pytest.mark.parametrize("table", [middle.WIDE, middle.TILE_32, middle.TILE_16])
def test_a_product_takes_longer_the_more_tokens_it_has(table):
    B = {middle.TILE_16: 16, middle.TILE_32: 32}.get(table, 64)
    for cut in table:
        sizes = range(65, 6000, 64)
        times = [middle.product_us(case(N, (640, 2560), B, 128 // B), cut, 1) for N in sizes]
        assert times == sorted(times), cut


@pytest.mark.parametrize(
    ("N", "B", "G"), [(32, 128, 1), (2048, 16, 1), (2048, 32, 1), (2048, 8, 16)]
)
def test_others_are_left_to_others(N, B, G):
    assert middle.tiling_for(case(N, (640, 2560), B, G)) is None


@pytest.mark.parametrize("density", [0.25, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("shape", [(640, 2560), (2560, 640), (4096, 14336), (14336, 4096)])
@pytest.mark.parametrize("N", [777, 8191, 8192, 65536])
def test_a_copy_of_x_takes_no_more_than_absent_blocks_save(N, shape, density):
    """Or than partial sums take anyhow: the weight, its gradient and two moments are smaller."""
    wanted = case(N, shape, 16, 8, density)
    if "packed" in _tilings.tiling_for(wanted).path:
        inputs, outputs = shape
        saved = 4 * (1 - wanted.density) * inputs * outputs
        assert N * inputs <= max(2**23, saved)


def test_x_is_packed_where_memory_allows_it():
    large = _tilings.tiling_for(case(8192, (4096, 14336), 16, 8))
    many = _tilings.tiling_for(case(65536, (640, 2560), 16, 8))
    assert (large.path, many.path) == ("gluon packed", "gluon")
