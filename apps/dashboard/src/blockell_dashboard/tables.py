"""The data of each chart as columns, for CSV downloads.

R block rows, C block columns, K slots per row.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from blockell_format.snapshots import LayerInfo, LayerSnapshot

from . import stats

__all__ = ["Table", "age_table", "file_name", "to_csv", "topology_table"]

Table = Mapping[str, Sequence[Any] | np.ndarray[Any, Any]]
"""Columns of equal length by name."""


def to_csv(table: Table) -> bytes:
    """UTF-8 CSV with a header line. Numbers that are not finite become empty fields.

    Text that a spreadsheet would run as a formula is quoted with an apostrophe.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([_cell(name) for name in table])
    columns = [
        column.tolist() if isinstance(column, np.ndarray) else column for column in table.values()
    ]
    for row in zip(*columns, strict=True):
        writer.writerow([_cell(value) for value in row])
    return text.getvalue().encode()


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.9g}" if np.isfinite(value) else ""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return f"'{value}"
    return value


def file_name(*parts: str | int) -> str:
    """A file name of letters, digits, dots and dashes from any text."""
    name = "_".join(re.sub(r"[^A-Za-z0-9.]+", "-", str(part)).strip("-.") for part in parts)
    return name[:150] or "data"


def topology_table(layer: LayerSnapshot, info: LayerInfo) -> Table:
    """One line per block: where it is, its weight slice, age, score and whether it is new."""
    rows, slots = np.nonzero(layer.col_indices >= 0)
    columns = layer.col_indices[rows, slots]
    change = np.where(layer.swapped[rows, slots], stats.BORN, stats.KEPT)
    return {
        "row": rows,
        "column": columns,
        "slot": slots,
        "weight_row_start": rows * info.B,
        "weight_row_stop": (rows + 1) * info.B,
        "weight_column_start": columns * info.B,
        "weight_column_stop": (columns + 1) * info.B,
        "age_steps": layer.block_age_steps[rows, slots],
        "score": layer.block_score[rows, slots].astype(np.float64),
        "change": [stats.CHANGE_NAMES[code] for code in change],
        "replaced_column": np.where(
            layer.swapped[rows, slots], layer.previous_columns[rows, slots], -1
        ),
    }


def age_table(ages: np.ndarray[Any, Any], upper: float) -> Table:
    """The bins of the age histogram; both ends belong to the bin."""
    left, right, counts = stats.age_histogram(ages, upper)
    return {
        "age_from_steps": left.astype(np.int64),
        "age_to_steps": right.astype(np.int64) - 1,
        "blocks": counts,
    }
