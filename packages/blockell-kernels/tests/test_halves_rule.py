"""Which float32 products are computed as float16 halves, and how. Needs no GPU.

Legend: B tile side, N tokens.
"""

from __future__ import annotations

import importlib

import pytest
import torch

from blockell_kernels._backends import DIRECTIONS, Case
from blockell_kernels._gpu import TILE_SIZES

tilings = importlib.import_module("blockell_kernels._triton._tilings_halves")
rule = importlib.import_module("blockell_kernels._triton._rule")
by_halves = importlib.import_module("blockell_kernels._gluon._halves")


def case(direction, N, inp, out, B, G=1, density=0.5):
    C = inp // B
    K = max(1, round(density * C))
    return Case(direction, torch.device("meta"), torch.float32, N, out // B, C, K, B, G)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("B", TILE_SIZES)
def test_many_tokens_are_computed_as_halves(direction, B):
    """Of live blocks where rows are alike, else of the whole weight unless few blocks are live."""
    alike = tilings.halves_for(case(direction, 8192, 640, 2560, B, 128 // B))
    narrow = direction == "grad_input" and B < 64
    assert alike.path == ("dense halves" if narrow else "halves")
    widest = B if alike.path == "halves" and direction == "grad_input" else 128
    assert widest >= alike.BN
    free = tilings.halves_for(case(direction, 8192, 640, 2560, B))
    assert free is not None
    few = tilings.halves_for(case(direction, 8192, 5120, 2560, B, density=0.01))
    assert few is None or few.path == "halves"


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_few_tokens_are_not(direction):
    assert tilings.halves_for(case(direction, 64, 4096, 14336, 128)) is None
    assert tilings.halves_for(case(direction, 512, 640, 2560, 8)) is None


@pytest.mark.parametrize("tiles", [1, 7, 40, 50, 100, 131, 132, 133, 264, 400, 1792])
@pytest.mark.parametrize("tokens", [1, 128, 1000, 8192, 65536])
def test_parts_of_the_tokens(tiles, tokens):
    parts, programs = tilings.parts_of(tiles, tokens, 132), 132
    steps = -(-tokens // tilings.DEPTH)
    assert 1 <= parts <= steps
    assert parts == 1 or parts * tiles <= 2 * programs

    def length(parts):
        return -(-tiles * parts // programs) * (-(-steps // parts) + 4)

    assert length(parts) <= length(1)


def test_without_these_kernels_3xtf32_is_looked_up(monkeypatch):
    """Its own measurements answer on other GPUs, and on Hopper below Triton 3.6."""
    product = case("forward", 8192, 640, 2560, 8)
    assert rule.arithmetic(product) == "3xtf32"
    assert not rule.verdict(product).wins
    monkeypatch.setattr(by_halves, "available", lambda device: True)
    assert rule.arithmetic(product) == "float32"
    assert rule.verdict(product).wins
