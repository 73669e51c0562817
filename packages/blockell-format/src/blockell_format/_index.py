"""The transposed index: for every block column, the slots that hold it.

Legend: R block rows, C block columns, K blocks (slots) per row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TransposedIndex(NamedTuple):
    """Column-wise view of a topology. Shapes depend on R, K and C only, never on the topology.

    The slots of column c are `order[col_start[c]:col_start[c + 1]]`, by ascending row. Empty
    columns have equal starts. Spare slots lie behind `col_start[C]`.
    """

    order: Tensor
    """int32 [R*K]: flat slot numbers r*K + k, sorted by column, then row; spare slots last."""
    col_start: Tensor
    """int32 [C+1]: where each column begins in `order`; the last entry is the number of live
    blocks."""

    @property
    def counts(self) -> Tensor:
        """int32 [C]: live blocks per column."""
        return self.col_start[1:] - self.col_start[:-1]

    def rows(self, K: int) -> Tensor:
        """int32 [R*K]: block row of every entry of `order`."""
        return self.order // K

    def slots(self, K: int) -> Tensor:
        """int32 [R*K]: slot of every entry of `order`."""
        return self.order % K


def transposed_index(
    col_indices: Tensor, C: int, out: TransposedIndex | None = None
) -> TransposedIndex:
    """Build the transposed index on the device of `col_indices`, without host synchronisation.

    Args:
        col_indices: int32 [R, K], a valid topology (see `BlockELLFormat.validate`); -1 in spare
            slots.
        C: block columns.
        out: an index of the same shapes to overwrite; its tensors keep their addresses, which is
            what captured graphs and compiled code need.

    Returns:
        `out`, or a new index.

    Raises:
        ValueError: wrong shape of `col_indices`, or `out` of other shapes.
    """
    if col_indices.dim() != 2:
        raise ValueError(f"col_indices has shape {tuple(col_indices.shape)}; it must be [R, K].")
    columns = col_indices.reshape(-1)
    keys = torch.where(columns < 0, C, columns)
    # flat slot numbers ascend with the row, so a stable sort by column sorts by row within it
    ordered, order = torch.sort(keys, stable=True)
    edges = torch.arange(C + 1, dtype=ordered.dtype, device=ordered.device)
    col_start = torch.searchsorted(ordered, edges, out_int32=True)
    if out is None:
        return TransposedIndex(order.to(torch.int32), col_start)
    if out.order.shape != order.shape or out.col_start.shape != col_start.shape:
        raise ValueError(
            f"out has shapes {tuple(out.order.shape)} and {tuple(out.col_start.shape)}; "
            f"this topology needs ({order.numel()},) and ({C + 1},)."
        )
    out.order.copy_(order)
    out.col_start.copy_(col_start)
    return out
