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
from .tasks import TaskSpan, birth_tasks

__all__ = ["Table", "age_table", "change_table", "file_name", "to_csv", "topology_table"]

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


def topology_table(
    layer: LayerSnapshot, info: LayerInfo, *, step: int = 0, spans: Sequence[TaskSpan] = ()
) -> Table:
    """One line per block: where it is, its weight slice, age, score and whether it is new.

    With the trainings of a run (`spans`), also in which of them it was born.
    """
    rows, slots = np.nonzero(layer.col_indices >= 0)
    columns = layer.col_indices[rows, slots]
    change = np.where(layer.swapped[rows, slots], stats.BORN, stats.KEPT)
    ages = layer.block_age_steps[rows, slots]
    tasks: Table = {}
    if spans:
        tasks = {"task_of_birth": [spans[i].name for i in birth_tasks(ages, step, spans)]}
    return {
        "row": rows,
        "column": columns,
        "slot": slots,
        "weight_row_start": rows * info.B,
        "weight_row_stop": (rows + 1) * info.B,
        "weight_column_start": columns * info.B,
        "weight_column_stop": (columns + 1) * info.B,
        "age_steps": ages,
        "score": layer.block_score[rows, slots].astype(np.float64),
        "change": [stats.CHANGE_NAMES[code] for code in change],
        "replaced_column": np.where(
            layer.swapped[rows, slots], layer.previous_columns[rows, slots], -1
        ),
        **tasks,
    }


def change_table(layer: LayerSnapshot, earlier: LayerSnapshot, info: LayerInfo) -> Table:
    """One line per position that holds a block now, or held one at the earlier snapshot.

    Age and score are those of now; empty for blocks that died.
    """
    changes = stats.change_since(
        earlier.col_indices,
        earlier.block_age_steps,
        layer.col_indices,
        layer.block_age_steps,
        info.C,
    )
    rows, columns = np.nonzero(changes != stats.ABSENT)
    ages = stats.block_grid(layer.col_indices, layer.block_age_steps, info.C, dtype=np.float64)
    scores = stats.block_grid(layer.col_indices, layer.block_score, info.C, dtype=np.float64)
    return {
        "row": rows,
        "column": columns,
        "change": [stats.CHANGE_NAMES[code] for code in changes[rows, columns]],
        "age_steps": ages[rows, columns],
        "score": scores[rows, columns],
    }


def age_table(ages: np.ndarray[Any, Any], upper: float) -> Table:
    """The bins of the age histogram; both ends belong to the bin."""
    left, right, counts = stats.age_histogram(ages, upper)
    return {
        "age_from_steps": left.astype(np.int64),
        "age_to_steps": right.astype(np.int64) - 1,
        "blocks": counts,
    }
