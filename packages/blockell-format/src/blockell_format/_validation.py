"""Rules every Block-ELL topology keeps, checked with numpy.

Legend: R block rows, C block columns, K blocks (slots) per row.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt


def num_blocks_for_density(C: int, density: float) -> int:
    """Blocks per row for an asked density: `max(1, round(density * C))`.

    Args:
        C: block columns, at least 1.
        density: asked share of live blocks in (0, 1].

    Returns:
        K in [1, C]. The actual density, K / C, can differ from the asked one.

    Raises:
        ValueError: C below 1 or density outside (0, 1].
    """
    if C < 1:
        raise ValueError(f"C (={C}) must be at least 1.")
    if not (math.isfinite(density) and 0.0 < density <= 1.0):
        raise ValueError(f"density (={density}) must be in (0, 1]; 1.0 keeps every block.")
    return max(1, round(density * C))


def validate_row_group(R: int, row_group: int) -> None:
    """Raise ValueError unless `row_group` is a positive divisor of R."""
    if row_group < 1 or R % row_group:
        divisors = [g for g in range(1, min(R, 64) + 1) if R % g == 0]
        raise ValueError(
            f"row_group (={row_group}) must be a positive divisor of R (={R}); "
            f"possible: {', '.join(map(str, divisors))}."
        )


def validate_col_indices(col_indices: npt.ArrayLike, C: int, row_group: int = 1) -> int:
    """Check a topology and return its number of live blocks per row.

    Every row's live entries are distinct and in [0, C); they come first, spare slots (-1) last;
    every row has the same number of live entries, at least one; rows of a row group are equal.

    Args:
        col_indices: integers [R, K].
        C: block columns.
        row_group: rows that share their columns, a divisor of R.

    Raises:
        ValueError: naming the first row and slot that break a rule.
    """
    cols = np.asarray(col_indices)
    if cols.ndim != 2 or cols.shape[0] < 1 or cols.shape[1] < 1:
        raise ValueError(f"col_indices has shape {cols.shape}; it must be [R, K], both at least 1.")
    if cols.dtype.kind not in "iu":
        raise ValueError(f"col_indices has dtype {cols.dtype}; it must be an integer type.")
    R = cols.shape[0]
    if C < 1:
        raise ValueError(f"C (={C}) must be at least 1.")
    validate_row_group(R, row_group)

    bad = (cols < -1) | (cols >= C)
    if bad.any():
        row, slot = _first(bad)
        raise ValueError(
            f"col_indices[row {row}, slot {slot}] (={cols[row, slot]}) must be in [0, {C}), "
            "or -1 in a spare slot."
        )
    live = cols >= 0
    hole = live[:, 1:] & ~live[:, :-1]
    if hole.any():
        row, slot = _first(hole)
        raise ValueError(
            f"col_indices[row {row}, slot {slot}] is spare (-1) but slot {slot + 1} is live; "
            "spare slots must trail the live ones."
        )
    counts = live.sum(axis=1)
    if counts[0] == 0:
        raise ValueError("col_indices[row 0, slot 0] (=-1) leaves row 0 without a live block.")
    if (counts != counts[0]).any():
        row = int(np.argmax(counts != counts[0]))
        slot = int(min(counts[row], counts[0]))
        raise ValueError(
            f"row {row} has {counts[row]} live blocks but row 0 has {counts[0]} (they part at "
            f"slot {slot}); every row must have the same number."
        )
    _check_distinct(cols, int(counts[0]))
    if row_group > 1:
        first_rows = np.repeat(cols[::row_group], row_group, axis=0)
        differs = cols != first_rows
        if differs.any():
            row, slot = _first(differs)
            raise ValueError(
                f"col_indices[row {row}, slot {slot}] (={cols[row, slot]}) differs from row "
                f"{row - row % row_group} (={first_rows[row, slot]}); the rows of a row group "
                f"(row_group={row_group}) must hold the same columns in the same slots."
            )
    return int(counts[0])


def _check_distinct(cols: npt.NDArray[np.integer], num_live: int) -> None:
    """Raise ValueError when a row's first `num_live` entries hold a column twice."""
    order = np.argsort(cols[:, :num_live], axis=1, kind="stable")
    ordered = np.take_along_axis(cols[:, :num_live], order, axis=1)
    twice = ordered[:, 1:] == ordered[:, :-1]
    if twice.any():
        row, place = _first(twice)
        first, second = order[row, place], order[row, place + 1]
        raise ValueError(
            f"col_indices[row {row}] holds column {ordered[row, place]} twice, in slot {first} "
            f"and slot {second}; the live columns of a row must be distinct."
        )


def _first(mask: npt.NDArray[np.bool_]) -> tuple[int, int]:
    """Row and slot of the first True."""
    row, slot = np.unravel_index(int(np.argmax(mask)), mask.shape)
    return int(row), int(slot)
