"""The Block-ELL container.

Legend: R block rows, C block columns, K blocks (slots) per row, B tile side.
`W[r*B + i, col_indices[r, k]*B + j] = values[r, k, i, j]` for a weight W [R*B, C*B].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._validation import validate_col_indices, validate_row_group


@dataclass(eq=False)
class BlockELLFormat:
    """A block-sparse matrix with the same number of blocks in every block row.

    Slots are stable: nothing here ever reorders them, and rows need not be sorted by column.
    Construction checks nothing and costs nothing; call `validate()` on data from outside.
    """

    values: Tensor
    """Float [R, K, B, B]; zeros in spare slots."""
    col_indices: Tensor
    """int32 [R, K]; live slots first, -1 in spare slots."""
    C: int
    """Block columns."""
    row_group: int = 1
    """Rows that share their columns, a divisor of R."""

    @property
    def R(self) -> int:  # noqa: N802
        """Block rows."""
        return self.values.shape[0]

    @property
    def K(self) -> int:  # noqa: N802
        """Slots per row, spare ones included."""
        return self.values.shape[1]

    @property
    def B(self) -> int:  # noqa: N802
        """Tile side."""
        return self.values.shape[3]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix: (R*B, C*B)."""
        return self.R * self.B, self.C * self.B

    @property
    def num_live(self) -> int:
        """Live blocks per row. Reads one row: synchronises with an accelerator."""
        return int((self.col_indices[0] >= 0).sum())

    @property
    def density(self) -> float:
        """Share of live blocks, num_live / C. Synchronises with an accelerator."""
        return self.num_live / self.C

    def validate(self) -> int:
        """Check every rule of the format; returns the number of live blocks per row.

        Copies the indices to the CPU. On the meta device, where there is no content, only types
        and shapes are checked, and the result is K.

        Raises:
            ValueError: wrong dtype, shape or device, or a topology that breaks a rule; the
                message names row and slot.
        """
        values, cols = self.values, self.col_indices
        if not values.is_floating_point():
            raise ValueError(f"values has dtype {values.dtype}; it must be a floating point type.")
        if cols.dtype != torch.int32:
            raise ValueError(
                f"col_indices has dtype {cols.dtype}; it must be torch.int32: "
                "col_indices.to(torch.int32)."
            )
        if values.dim() != 4 or values.shape[2] != values.shape[3] or 0 in values.shape:
            raise ValueError(
                f"values has shape {tuple(values.shape)}; it must be [R, K, B, B], none of them 0."
            )
        if cols.shape != values.shape[:2]:
            raise ValueError(
                f"col_indices has shape {tuple(cols.shape)}; it must be [R, K] = "
                f"{tuple(values.shape[:2])}, the leading shape of values."
            )
        if cols.device != values.device:
            raise ValueError(
                f"col_indices is on {cols.device} and values on {values.device}; "
                "they must be on one device."
            )
        if cols.device.type == "meta":
            validate_row_group(self.R, self.row_group)
            return self.K
        num_live = validate_col_indices(cols.detach().cpu().numpy(), self.C, self.row_group)
        filled = (values.detach()[:, num_live:] != 0).flatten(2).any(dim=2)
        if bool(filled.any()):
            row, place = (int(i) for i in filled.nonzero()[0])
            raise ValueError(
                f"values[row {row}, slot {num_live + place}] is not zero but the slot is spare; "
                "spare slots must hold zeros."
            )
        return num_live
