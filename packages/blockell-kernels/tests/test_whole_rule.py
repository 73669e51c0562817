"""How products by the whole weight are cut. Needs no GPU."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from blockell_kernels._gluon import _whole
from blockell_kernels._gluon._whole import Cut, cut, cuts

SMS = 132


def test_few_tokens_split_long_sums():
    assert cut(128, 640, 2560, 32, SMS).parts > 1  # five units of outputs
    assert cut(128, 14336, 4096, 32, SMS) == Cut(2, 1)  # 112 of them
    assert cut(1, 128, 64, 16, SMS).parts == 1  # one step cannot be split


def test_many_tokens_take_the_tile_that_fills_the_last_round():
    assert cut(8192, 2560, 640, 32, SMS) == Cut(5, 1)
    assert cut(65536, 640, 2560, 16, SMS).pieces == 5


@pytest.mark.parametrize("B", _whole.LOADERS)
@pytest.mark.parametrize("forward", [True, False])
def test_every_cut_fits_and_is_shared_among_the_loading_warps(B, forward):
    for chosen in cuts(4096, 4096, 4096, B, SMS):
        made = _whole.constants(B, forward, chosen, True)
        assert made["PIECES0"] + made["PIECES1"] == chosen.pieces
        assert made["PIECES1"] > 0
        assert made["STAGES"] >= 3
        height, width = _whole.box(B, forward)
        blocks = 128 * 64 // (height * width)
        assert blocks % made["LOADERS"] == 0
        assert made["HAS_BIAS"] is not made["PARTS"]
