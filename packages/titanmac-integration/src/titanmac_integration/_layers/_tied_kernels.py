# mypy: ignore-errors
"""A Triton kernel that adds rows to the rows of a table that they were looked up from.

Legend: N rows, D width, V rows of the table. Always in the same order, however often a row occurs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 16, 256
"""Rows of one index that a program adds up at a time, and columns that it looks after."""


@triton.jit
def _add_rows(
    table_ptr,  # [V, D]
    rows_ptr,  # [N, D]
    sorted_ptr,  # int64 [N], indices in ascending order
    order_ptr,  # int64 [N], which row each of them belongs to
    N,
    D,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    first = tl.program_id(0)
    index = tl.load(sorted_ptr + first)
    before = tl.load(sorted_ptr + tl.maximum(first - 1, 0))
    if (first == 0) | (before != index):  # one program for every index that occurs
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < D
        total = tl.zeros((COLUMNS,), tl.float32)
        at = first
        more = True
        while more:
            one = at + tl.arange(0, ROWS)
            here = tl.load(sorted_ptr + one, one < N, other=-1) == index
            row = tl.load(order_ptr + one, here, other=0)
            x = tl.load(
                rows_ptr + row[:, None] * D + column[None, :],
                here[:, None] & inside[None, :],
                other=0.0,
            )
            total += tl.sum(x.to(tl.float32), 0)
            at += ROWS
            more = tl.sum(here.to(tl.int32), 0) == ROWS
        into = table_ptr + index * D + column
        value = tl.load(into, inside).to(tl.float32) + total
        tl.store(into, value.to(table_ptr.dtype.element_ty), inside)


def add_rows_(table: Tensor, rows: Tensor, indices: Tensor) -> Tensor:
    """``table[indices] += rows``, repeated indices included; contiguous [V, D], [N, D], [N]."""
    N, D = rows.shape
    ordered, order = indices.sort(stable=True)
    if N > 0:
        _add_rows[(N, triton.cdiv(D, COLUMNS))](
            table, rows, ordered, order, N, D, ROWS=ROWS, COLUMNS=COLUMNS
        )
        torch.autograd.graph.increment_version(table)
    return table
