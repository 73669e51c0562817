"""What is decided for few tokens: where their kernels run, in strips that fit every GPU."""

from __future__ import annotations

import pytest
import torch

from blockell_kernels._backends import DIRECTIONS, Case

few = pytest.importorskip("blockell_kernels._triton._few_tokens")
middle = pytest.importorskip("blockell_kernels._triton._mid_forward")
middle_values = pytest.importorskip("blockell_kernels._triton._mid_grad_values")
middle_back = pytest.importorskip("blockell_kernels._triton._mid_grad_input")

DTYPES = [torch.bfloat16, torch.float32]
SHAPES = [(640, 2560), (2560, 640), (4096, 14336), (14336, 4096), (128, 128)]
SHARED_MEMORY_BYTES = {(7, 0): 48 * 1024, (8, 6): 99 * 1024, (9, 0): 227 * 1024}


def case(direction, N, shape, B, G, dtype=torch.bfloat16, density=0.5):
    R, C = shape[1] // B, shape[0] // B
    sizes = N, R, C, max(1, round(density * C)), B, G
    return Case(direction, torch.device("cuda"), dtype, *sizes)


@pytest.fixture(params=SHARED_MEMORY_BYTES, ids=str)
def gpu(request, monkeypatch):
    monkeypatch.setattr(few, "capability", lambda device: request.param)
    for module in (few, middle, middle_back, middle_values):
        monkeypatch.setattr(module, "num_sms", lambda device: 132)
    few.strip_for.cache_clear()
    yield request.param
    few.strip_for.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS[:2])
@pytest.mark.parametrize(("B", "G"), [(8, 1), (16, 1), (16, 8), (32, 4), (128, 1)])
def test_strips_divide_their_results_and_fit_the_gpu(gpu, direction, dtype, B, G):
    for shape in SHAPES:
        for N in (1, 16, 17, 64, 100, 200, 512):
            strip = few.strip_for(case(direction, N, shape, B, G, dtype))
            if strip is None:
                backward = direction == "grad_input"
                assert (middle_back.FEWEST if backward else few.TOKEN_TILE) < N
                continue
            width = B if direction == "grad_input" else B * G
            assert width % strip.BN == 0
            rows = few._token_tile(N)
            step = (rows + max(strip.BN, 16)) * strip.BK * dtype.itemsize
            assert step * strip.stages <= SHARED_MEMORY_BYTES[gpu], (shape, N, strip)


def test_a_new_number_of_tokens_needs_no_new_kernel(gpu):
    strips = {few.strip_for(case("forward", N, (640, 2560), 16, 8)) for N in range(1, 17)}
    assert len(strips) == 1


@pytest.mark.parametrize(("N", "taken"), [(0, False), (1, True), (64, True), (513, False)])
def test_up_to_64_tokens_are_few_and_more_may_be(gpu, N, taken):
    assert (few.strip_for(case("forward", N, (640, 2560), 16, 8)) is not None) == taken


def test_with_more_tokens_it_depends_on_the_case(gpu):
    def taken(direction, *rest):
        return few.strip_for(case(direction, *rest)) is not None

    assert taken("grad_values", 512, (640, 2560), 16, 8) == (gpu < (9, 0))
    assert taken("grad_values", 512, (640, 2560), 16, 8, torch.float32)
    assert not taken("grad_values", 512, (640, 2560), 16, 1)
    assert not taken("grad_values", 128, (4096, 14336), 128, 1)
    assert taken("forward", 128, (4096, 14336), 128, 1) == (gpu < (9, 0))
    assert taken("forward", 128, (4096, 14336), 128, 1, torch.float32)
    assert not taken("forward", 256, (4096, 14336), 128, 1)
    assert taken("grad_input", 512, (640, 2560), 128, 1) == (gpu < (9, 0))
    assert taken("grad_input", 512, (640, 2560), 128, 1, torch.float32)
    assert not taken("grad_input", 512, (2560, 640), 128, 1)


def test_long_sums_of_input_gradients_are_split_on_hopper(gpu):
    """16 tokens, 4096 -> 14336: 64 strips of 64 results, sums of 7168."""
    strip = few.strip_for(case("grad_input", 16, (4096, 14336), 128, 1))
    assert (strip.BN, strip.parts) == ((64, 8) if gpu >= (9, 0) else (32, 2))
    short = few.strip_for(case("grad_input", 16, (2560, 640), 64, 1))
    assert short.parts == 1
