"""Rules of a topology, without torch."""

from __future__ import annotations

import numpy as np
import pytest

from blockell_format import num_blocks_for_density, validate_col_indices


def test_valid_topologies() -> None:
    assert validate_col_indices([[3, 0, 1], [2, 3, 0]], 4) == 3
    assert validate_col_indices([[3, 0, -1], [2, 3, -1]], 4) == 2
    assert validate_col_indices([[0]], 1) == 1
    assert validate_col_indices(np.array([[1, 0], [1, 0], [2, 1], [2, 1]]), 3, row_group=2) == 2


@pytest.mark.parametrize(
    ("col_indices", "C", "row_group", "message"),
    [
        ([[0, 1], [2, 2]], 4, 1, r"col_indices\[row 1\] holds column 2 twice, in slot 0 and slot"),
        ([[0, 1, 2], [3, 1, 3]], 4, 1, r"row 1\] holds column 3 twice, in slot 0 and slot 2"),
        ([[0, 1], [2, 4]], 4, 1, r"\[row 1, slot 1\] \(=4\) must be in \[0, 4\), or -1"),
        ([[0, -2], [2, 1]], 4, 1, r"\[row 0, slot 1\] \(=-2\) must be in \[0, 4\), or -1"),
        ([[0, 1], [-1, 1]], 4, 1, r"\[row 1, slot 0\] is spare \(-1\) but slot 1 is live"),
        ([[0, 1], [2, -1]], 4, 1, r"row 1 has 1 live blocks but row 0 has 2 .* slot 1\)"),
        ([[-1, -1], [-1, -1]], 4, 1, r"row 0, slot 0\] \(=-1\) leaves row 0 without a live block"),
        ([[0, 1], [1, 0]], 4, 2, r"row 1, slot 0\] \(=1\) differs from row 0 \(=0\)"),
        ([[0, 1], [1, 0], [0, 2]], 4, 2, r"row_group \(=2\) must be .* R \(=3\); possible: 1, 3"),
        ([[0, 1]], 4, 0, r"row_group \(=0\) must be a positive divisor"),
        ([[0, 1]], 0, 1, r"C \(=0\) must be at least 1"),
        ([0, 1], 4, 1, r"col_indices has shape \(2,\); it must be \[R, K\]"),
        (np.zeros((2, 0), dtype=np.int32), 4, 1, r"shape \(2, 0\); it must be \[R, K\]"),
        ([[0.0, 1.0]], 4, 1, r"dtype float64; it must be an integer type"),
        ([[True, False]], 4, 1, r"dtype bool; it must be an integer type"),
    ],
)
def test_messages_name_row_and_slot(
    col_indices: object, C: int, row_group: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        validate_col_indices(col_indices, C, row_group)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("C", "density", "blocks"),
    [(40, 0.5, 20), (40, 1.0, 40), (40, 0.001, 1), (1, 0.3, 1), (10, 0.34, 3), (7, 0.9999, 7)],
)
def test_num_blocks_for_density(C: int, density: float, blocks: int) -> None:
    assert num_blocks_for_density(C, density) == blocks


@pytest.mark.parametrize("density", [0.0, -0.1, 1.01, float("nan"), float("inf")])
def test_density_out_of_range(density: float) -> None:
    with pytest.raises(ValueError, match=r"density \(=.*\) must be in \(0, 1\]"):
        num_blocks_for_density(8, density)


def test_no_columns() -> None:
    with pytest.raises(ValueError, match=r"C \(=0\) must be at least 1"):
        num_blocks_for_density(0, 0.5)
