"""What tilings ask of a Hopper GPU's multiprocessor, whatever the layer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockell_kernels._backends import DIRECTIONS, Case

pytest.importorskip("triton")
from blockell_kernels._triton import _tilings
from blockell_kernels._triton._tiling import power_of_two_divisor

pytestmark = pytest.mark.usefixtures("pretended_hopper")
SHARED_BYTES = 227 * 1024


def shared_bytes(case, tiling):
    """Of all programs that a multiprocessor is to hold at a time."""
    width = min(128, power_of_two_divisor(case.row_group * case.B))
    size = 4 if case.dtype == torch.float32 else 2
    if case.direction == "grad_values":
        rows, columns, programs = min(tiling.BM, width), tiling.BN, tiling.waves
        return (rows + columns) * tiling.BK * size * tiling.stages * programs
    columns = min(tiling.BN, width if case.direction == "forward" else case.B)
    loads = (tiling.BM + columns) * tiling.BK * size * tiling.stages
    if tiling.path != "pointers":
        loads += tiling.BM * columns * size // tiling.store_parts
    return loads * max(1, tiling.persistent)


@given(
    direction=st.sampled_from(DIRECTIONS),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    N=st.integers(1, 200000),
    groups=st.integers(1, 300),
    C=st.integers(1, 300),
    K=st.integers(1, 300),
    B=st.sampled_from([8, 16, 32, 64, 128]),
    row_group=st.sampled_from([1, 2, 3, 4, 8]),
)
def test_programs_fit_into_shared_memory(direction, dtype, N, groups, C, K, B, row_group):
    R = groups * row_group
    case = Case(direction, torch.device("cuda", 0), dtype, N, R, C, min(K, C), B, row_group)
    tiling = _tilings.tiling_for(case)
    tiling = tiling.otherwise or tiling
    assert tiling.path != "gluon"  # there is one behind it for operands that it does not take
    assert shared_bytes(case, tiling) <= SHARED_BYTES


def test_few_tiles_are_split_for_one_program_and_many_for_two():
    """Weight gradients of 2560 -> 640 in 16x8: 25 tiles at 25%, 50 at 50%."""
    sizes = {"N": 8192, "R": 40, "C": 160, "B": 16, "row_group": 8}
    common = {"direction": "grad_values", "device": torch.device("cuda", 0)}
    few, many = (
        _tilings.tiling_for(Case(**common, **sizes, dtype=torch.bfloat16, K=K)) for K in (40, 80)
    )
    assert (few.waves, many.waves) == (1, 2)
