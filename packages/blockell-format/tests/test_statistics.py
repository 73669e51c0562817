"""Statistics of topologies, without torch."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockell_format import (
    block_mask,
    block_overlap,
    column_entropy,
    column_usage,
    exploration_rate,
    topology_checksum,
    validate_col_indices,
)

GOLDEN_CHECKSUM = "410e944acb1b01ebda0b60f193a86238"


@st.composite
def topologies(draw: st.DrawFn) -> tuple[npt.NDArray[np.int32], int]:
    """A valid topology with spare slots, and C."""
    R, C = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    live = draw(st.integers(1, C))
    spare = draw(st.integers(0, C - live))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = [rng.permutation(C)[:live] for _ in range(R)]
    columns = np.pad(np.array(rows, dtype=np.int32), ((0, 0), (0, spare)), constant_values=-1)
    assert validate_col_indices(columns, C) == live
    return columns, C


@given(topologies())
def test_usage_counts_live_blocks(topology: tuple[npt.NDArray[np.int32], int]) -> None:
    columns, C = topology
    usage = column_usage(columns, C)
    assert usage.dtype == np.int64
    assert usage.tolist() == [int((columns == c).sum()) for c in range(C)]
    assert usage.tolist() == block_mask(columns, C).sum(axis=0).tolist()


@given(topologies())
def test_entropy_bounds(topology: tuple[npt.NDArray[np.int32], int]) -> None:
    columns, C = topology
    assert 0.0 <= column_entropy(columns, C) <= 1.0


def test_entropy_values() -> None:
    assert column_entropy([[0, 1], [2, 3]], 4) == pytest.approx(1.0)
    assert column_entropy([[0], [0], [0]], 4) == 0.0
    assert column_entropy([[0, 1]], 4) == pytest.approx(0.5)
    assert column_entropy([[0]], 1) == 1.0
    assert column_entropy([[-1, -1]], 4) == 0.0
    skewed = [0.5, 0.25, 0.25]
    wanted = -sum(p * math.log(p) for p in skewed) / math.log(3)
    assert column_entropy([[0], [0], [1], [2]], 3) == pytest.approx(wanted)


@given(topologies())
def test_overlap_with_itself(topology: tuple[npt.NDArray[np.int32], int]) -> None:
    columns, C = topology
    overlap = block_overlap(columns, columns, C)
    density = block_mask(columns, C).mean()
    assert overlap.fraction == 1.0
    assert overlap.chance == pytest.approx(density / (2 - density))
    assert overlap.intersection == overlap.union == int((columns >= 0).sum())
    # the order of slots means nothing
    live = int((columns[0] >= 0).sum())
    turned = columns.copy()
    turned[:, :live] = columns[:, :live][:, ::-1]
    assert block_overlap(columns, turned, C) == overlap


@pytest.mark.parametrize("K", [4, 10, 20, 36])
def test_overlap_of_random_topologies_is_at_chance(K: int) -> None:
    R, C = 600, 40
    rng = np.random.default_rng(K)
    a, b = (rng.permuted(np.tile(np.arange(C), (R, 1)), axis=1)[:, :K] for _ in range(2))
    overlap = block_overlap(a, b, C)
    d = K / C
    assert overlap.chance == pytest.approx(d / (2 - d))
    assert overlap.fraction == pytest.approx(overlap.chance, abs=0.01)


def test_overlap_of_masks_and_of_unequal_densities() -> None:
    mask = np.array([[True, False, False, True], [False, False, False, False]])
    overlap = block_overlap(mask, [[0, 1], [1, 2]], 4)
    assert (overlap.intersection, overlap.union) == (1, 5)
    p, q = 0.25, 0.5
    assert overlap.chance == pytest.approx(p * q / (p + q - p * q))
    nothing = np.zeros((2, 4), dtype=bool)
    assert block_overlap(nothing, nothing, 4).fraction == 0.0


def test_overlap_needs_one_shape() -> None:
    with pytest.raises(ValueError, match="a has 1 block rows and b has 2"):
        block_overlap([[0]], [[0], [1]], 4)
    with pytest.raises(ValueError, match=r"b is a mask of shape \(1, 3\); it must be \[R, C=4\]"):
        block_overlap([[0]], np.ones((1, 3), dtype=bool), 4)


def test_exploration_rate() -> None:
    history = np.array([[[0, 1], [2, -1]], [[0, 3], [2, -1]], [[0, 1], [3, -1]]])
    assert exploration_rate(history, 4) == 5 / 8
    assert exploration_rate(iter(history[:1]), 4) == 3 / 8
    with pytest.raises(ValueError, match="col_indices_history is empty"):
        exploration_rate([], 4)
    with pytest.raises(ValueError, match="mixes layers of 1 and 2 block rows"):
        exploration_rate([[[0]], [[0], [1]]], 4)


@pytest.mark.parametrize("function", [column_usage, column_entropy, block_mask])
def test_out_of_range(function: object) -> None:
    assert callable(function)
    with pytest.raises(ValueError, match=r"holds values from 0 to 4; they must be in \[0, 4\)"):
        function([[0, 4]], 4)
    with pytest.raises(ValueError, match="holds values from -2 to 1"):
        function([[-2, 1]], 4)
    with pytest.raises(ValueError, match="dtype float64; it must hold integers"):
        function([[0.5]], 4)
    with pytest.raises(ValueError, match=r"C \(=0\) must be at least 1"):
        function([[0]], 0)


def test_block_mask_needs_rows() -> None:
    with pytest.raises(ValueError, match=r"shape \(2,\); it must be \[R, K\]"):
        block_mask([0, 1], 4)


def test_checksum_golden_value() -> None:
    # a changed value would make every recorded checksum incomparable
    columns = np.array([[0, 1], [2, -1]], dtype=np.int32)
    assert topology_checksum(columns) == GOLDEN_CHECKSUM
    assert topology_checksum(columns.astype(">i4")) == GOLDEN_CHECKSUM
    assert topology_checksum(np.asfortranarray(columns)) == GOLDEN_CHECKSUM


def test_checksum_is_sensitive() -> None:
    columns = np.array([[0, 1], [2, -1]], dtype=np.int32)
    ages = np.arange(4, dtype=np.int32).reshape(2, 2)
    sums = [
        topology_checksum(columns),
        topology_checksum(columns[:, ::-1]),
        topology_checksum(columns[::-1]),
        topology_checksum(columns.astype(np.int64)),
        topology_checksum(columns.reshape(1, 4)),
        topology_checksum(columns.reshape(4, 1)),
        topology_checksum(columns, ages),
        topology_checksum(ages, columns),
        topology_checksum(columns, ages[:0]),
    ]
    assert len(set(sums)) == len(sums)
    assert all(len(value) == 32 for value in sums)


def test_checksum_of_objects() -> None:
    with pytest.raises(ValueError, match="cannot fingerprint dtype object"):
        topology_checksum(np.array([None]))
