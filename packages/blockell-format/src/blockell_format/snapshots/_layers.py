"""Layers of a run and what a snapshot holds of each.

Legend: R block rows, C block columns, K storage slots per row, B tile side.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from .._validation import validate_col_indices, validate_row_group

MAX_SIZE = 2**31 - 1
"""Indices are int32."""


@dataclass(frozen=True)
class LayerInfo:
    """Name and sizes of one layer. Checked on construction.

    Raises:
        ValueError: an empty or non-UTF-8 name, a size below 1, K above C, row_group not a
            divisor of R.
    """

    name: str
    """Unique in the run; usually the module's qualified name."""
    R: int
    """Block rows."""
    C: int
    """Block columns."""
    K: int
    """Storage slots per row, spare ones included."""
    B: int
    """Tile side."""
    row_group: int = 1
    """Rows that share their columns."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"the name of a layer (={self.name!r}) must be a non-empty string.")
        try:
            self.name.encode()
        except UnicodeEncodeError:
            raise ValueError(f"layer name {self.name!r} is not valid UTF-8 text.") from None
        for size in ("R", "C", "K", "B", "row_group"):
            value = getattr(self, size)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{size} (={value!r}) of layer {self.name!r} must be an integer.")
            if not 1 <= value <= MAX_SIZE:
                raise ValueError(
                    f"{size} (={value}) of layer {self.name!r} must be in [1, {MAX_SIZE}]."
                )
        if self.K > self.C:
            raise ValueError(
                f"K (={self.K}) of layer {self.name!r} must be at most C (={self.C}): "
                "a row cannot hold a column twice."
            )
        validate_row_group(self.R, self.row_group)


@dataclass(eq=False)
class LayerSnapshot:
    """One layer at one topology decision.

    A snapshot read with fewer `fields` lacks the others: touching one raises AttributeError.
    """

    col_indices: npt.NDArray[np.int32]
    """int32 [R, K]: columns after the decision; -1 in spare slots, which come last."""
    block_age_steps: npt.NDArray[np.integer[Any]]
    """int32 or int64 [R, K]: optimizer steps since birth."""
    block_score: npt.NDArray[np.float32]
    """float32 [R, K]."""
    swapped: npt.NDArray[np.bool_]
    """bool [R, K]: slots that got another column at this decision."""
    previous_columns: npt.NDArray[np.int32]
    """int32 [R, K]: the columns before the decision; -1 where the slot was spare. Only the
    entries where `swapped` is true carry information."""

    def __getattr__(self, name: str) -> Any:
        # called only for attributes that are absent
        if name in FIELDS:
            raise AttributeError(f"{name} was not read; name it in `fields` of read_layer.")
        raise AttributeError(f"LayerSnapshot has no attribute {name!r}.")

    def __repr__(self) -> str:
        parts = ", ".join(f"{k}: {v.dtype}{list(v.shape)}" for k, v in vars(self).items())
        return f"LayerSnapshot({parts})"


FIELDS = tuple(field.name for field in fields(LayerSnapshot))
DTYPES: dict[str, tuple[np.dtype[Any], ...]] = {
    "col_indices": (np.dtype("int32"),),
    "block_age_steps": (np.dtype("int32"), np.dtype("int64")),
    "block_score": (np.dtype("float32"),),
    "swapped": (np.dtype("bool"),),
    "previous_columns": (np.dtype("int32"),),
}
"""Types that each field may have, on disk and in memory."""


def partial_snapshot(arrays: dict[str, npt.NDArray[Any]]) -> LayerSnapshot:
    """A snapshot that has only some of the fields."""
    snapshot = LayerSnapshot.__new__(LayerSnapshot)
    vars(snapshot).update(arrays)
    return snapshot


def check_field(info: LayerInfo, field: str, array: npt.NDArray[Any]) -> None:
    """Raise ValueError unless the content of a field can belong to the layer.

    Scores may be anything, also NaN: they are measurements, not structure.
    """
    if array.dtype not in DTYPES[field]:
        wanted = " or ".join(str(dtype) for dtype in DTYPES[field])
        raise ValueError(f"{field} has dtype {array.dtype}; it must be {wanted}.")
    if array.shape != (info.R, info.K):
        raise ValueError(
            f"{field} has shape {list(array.shape)}; it must be [R, K] = {[info.R, info.K]}."
        )
    if field == "col_indices":
        validate_col_indices(array, info.C, info.row_group)
    elif field == "previous_columns":
        bad = (array < -1) | (array >= info.C)
        if bad.any():
            row, slot = np.unravel_index(int(np.argmax(bad)), bad.shape)
            raise ValueError(
                f"previous_columns[row {row}, slot {slot}] (={array[row, slot]}) must be in "
                f"[0, {info.C}), or -1 where the slot was spare."
            )
    elif field == "block_age_steps" and array.min() < 0:
        raise ValueError(f"block_age_steps holds {array.min()}; ages must not be negative.")
