"""Where the whole weight is walked: between few tokens and many, where most of it is present."""

from __future__ import annotations

import itertools

import pytest
import torch

from blockell_kernels._backends import DIRECTIONS, Case

walk = pytest.importorskip("blockell_kernels._triton._walk")

SHAPES = [(640, 2560), (2560, 640), (4096, 14336), (14336, 4096), (1536, 6144)]
TOKENS = (1, 16, 17, 32, 33, 64, 100, 256, 512, 2048, 8192, 65536)
SHARED_MEMORY_BYTES = 227 * 1024


def case(direction, N, shape, B, G=1, density=0.5, dtype=torch.bfloat16):
    R, C = shape[1] // B, shape[0] // B
    sizes = N, R, C, max(1, round(density * C)), B, G
    return Case(direction, torch.device("cuda"), dtype, *sizes)


@pytest.fixture
def on(monkeypatch):
    def capability(*found):
        monkeypatch.setattr(walk, "capability", lambda device: found)
        walk.walk_for.cache_clear()

    capability(9, 0)
    monkeypatch.setattr(walk, "num_sms", lambda device: 132)
    yield capability
    walk.walk_for.cache_clear()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_what_is_chosen_fits_and_is_decided_by_density(on, direction):
    for N, shape, (B, G) in itertools.product(
        TOKENS, SHAPES, [(8, 1), (16, 1), (32, 1), (64, 1), (128, 1), (16, 8), (32, 4), (8, 16)]
    ):
        if shape[1] // B % G:
            continue
        taken = [
            walk.walk_for(case(direction, N, shape, B, G, density)) for density in (0.01, 0.5, 1.0)
        ]
        assert taken[0] is None or B == 8
        assert taken[1] is None or taken[1] == taken[2]
        for found in taken:
            if found is not None:
                shared = (found.BM + found.BN) * found.BK * 2 * found.stages
                assert shared <= SHARED_MEMORY_BYTES, found
                assert found.BN % B == 0


def test_where_it_was_measured_to_win(on):
    def taken(*rest, **options):
        return walk.walk_for(case(*rest, **options)) is not None

    for N in (64, 256, 1024, 2048):
        assert taken("grad_values", N, (640, 2560), 16)
        assert taken("grad_values", N, (4096, 14336), 16)
    assert not taken("grad_values", 1024, (640, 2560), 16, density=0.05)
    assert not taken("grad_values", 1024, (4096, 14336), 16, 8)
    assert taken("forward", 128, (4096, 14336), 16)
    assert not taken("forward", 128, (640, 2560), 16)
    assert not taken("forward", 512, (4096, 14336), 16)
    assert taken("grad_input", 128, (4096, 14336), 16)
    assert not taken("grad_input", 64, (4096, 14336), 32)


def test_only_where_it_was_measured(on):
    measured = ("grad_values", 1024, (640, 2560), 16)
    assert walk.walk_for(case(*measured, dtype=torch.float32)) is None
    on(8, 0)
    assert walk.walk_for(case(*measured)) is None


def test_no_tokens_are_left_to_others(on):
    assert walk.walk_for(case("grad_values", 0, (640, 2560), 16)) is None
