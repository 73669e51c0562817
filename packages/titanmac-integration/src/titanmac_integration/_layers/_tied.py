"""A table that tokens are looked up in and hidden states multiplied by: one gradient for both.

torch makes one gradient of the whole table for each use and adds them: with a vocabulary of 128,000
that is a gigabyte of traffic for the few rows that were looked up. Legend: V vocabulary, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ._triton import has_triton


def takes_table(table: Tensor) -> bool:
    """Whether the Triton kernel adds to gradients of this table."""
    if torch.compiler.is_compiling() or not table.is_cuda or not torch.is_grad_enabled():
        return False
    return table.dtype == torch.float32 and table.requires_grad and has_triton()


def look_up(indices: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [..., D] of ``table`` [V, D], and the table for the one who multiplies by it.

    That one's gradient of the table is added to in place: it must hand over a tensor of its own.
    """
    rows: Tensor
    rows, shared = _LookUp.apply(indices, table)
    return rows, shared


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, indices: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(indices)
        ctx.size = len(table)
        ctx.set_materialize_grads(False)
        return functional.embedding(indices, table), table.view_as(table)

    @staticmethod
    def backward(
        ctx: Any, grad_rows: Tensor | None, grad_table: Tensor | None
    ) -> tuple[None, Tensor | None]:
        (indices,) = ctx.saved_tensors
        if grad_rows is None:
            return None, grad_table
        rows, flat = grad_rows.flatten(0, -2), indices.flatten()
        if grad_table is None:
            zeros = grad_rows.new_zeros(ctx.size, rows.shape[1])
            return None, zeros.index_add(0, flat, rows)
        if torch.is_grad_enabled():  # the gradient is to be differentiated in turn
            return None, grad_table.index_add(0, flat, rows.to(grad_table.dtype))
        from ._tied_kernels import add_rows_

        return None, add_rows_(grad_table.contiguous(), rows.contiguous(), flat)
