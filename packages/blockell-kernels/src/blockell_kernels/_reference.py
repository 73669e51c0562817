"""Block-ELL linear as its definition reads: loops over blocks, any floating dtype.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.

    W[r*B:(r+1)*B, c*B:(c+1)*B] = values[r, k]   where c = col_indices[r, k]
    y  = x W^T + bias          y_r  = sum_k x_c values[r, k]^T
    dx = dy W                  dx_c = sum over (r, k) holding c of dy_r values[r, k]
    dW = dy^T x, only the blocks that are present: dvalues[r, k] = dy_r^T x_c

This is the ground truth of the tests: it is slow, and meant to be read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blockell_kernels._backends import Backend, Pattern
from blockell_kernels._dense import check_columns


def _blocks(t: Tensor, B: int) -> Tensor:
    """[N, M*B] -> [N, M, B]."""
    return t.reshape(t.shape[0], t.shape[1] // B, B)


def forward(
    x: Tensor, values: Tensor, col_indices: Tensor, bias: Tensor | None, num_live: int | None = None
) -> Tensor:
    """y [N, R*B] from x [N, C*B], values [R, slots, B, B], col_indices [R, slots], bias [R*B]."""
    R, slots, B, _ = values.shape
    x_blocks = _blocks(x, B)
    y = x.new_zeros(x.shape[0], R, B)
    for r, columns in enumerate(col_indices.tolist()):
        for k, c in enumerate(columns[: slots if num_live is None else num_live]):
            y[:, r] += x_blocks[:, c] @ values[r, k].T
    y = y.reshape(x.shape[0], R * B)
    return y if bias is None else y + bias


def grad_input(
    dy: Tensor, values: Tensor, col_indices: Tensor, C: int, num_live: int | None = None
) -> Tensor:
    """dx [N, C*B] from dy [N, R*B]."""
    slots, B = values.shape[1:3]
    dy_blocks = _blocks(dy, B)
    dx = dy.new_zeros(dy.shape[0], C, B)
    for r, columns in enumerate(col_indices.tolist()):
        for k, c in enumerate(columns[: slots if num_live is None else num_live]):
            dx[:, c] += dy_blocks[:, r] @ values[r, k]
    return dx.reshape(dy.shape[0], C * B)


def grad_values(
    dy: Tensor, x: Tensor, col_indices: Tensor, B: int, num_live: int | None = None
) -> Tensor:
    """dvalues [R, slots, B, B] from dy [N, R*B] and x [N, C*B]; zeros in spare slots."""
    R, slots = col_indices.shape
    dy_blocks, x_blocks = _blocks(dy, B), _blocks(x, B)
    dvalues = x.new_zeros(R, slots, B, B)
    for r, columns in enumerate(col_indices.tolist()):
        for k, c in enumerate(columns[: slots if num_live is None else num_live]):
            dvalues[r, k] = dy_blocks[:, r].T @ x_blocks[:, c]
    return dvalues


def grad_bias(dy: Tensor) -> Tensor:
    """dbias [R*B] from dy [N, R*B]."""
    return dy.sum(0)


def block_grad_norms(dy: Tensor, x: Tensor, B: int) -> Tensor:
    """Frobenius norms [R, C] of all blocks of dy^T x, block by block."""
    dy_blocks, x_blocks = _blocks(dy, B), _blocks(x, B)
    R, C = dy_blocks.shape[1], x_blocks.shape[1]
    norms = x.new_zeros(R, C)
    for r in range(R):
        for c in range(C):
            norms[r, c] = torch.linalg.matrix_norm(dy_blocks[:, r].T @ x_blocks[:, c])
    return norms


def block_fisher(dy: Tensor, x: Tensor, B: int) -> Tensor:
    """Per-token Fisher trace [R, C]: squared norms of every token's gradient, token by token."""
    dy_blocks, x_blocks = _blocks(dy, B), _blocks(x, B)
    trace = x.new_zeros(dy_blocks.shape[1], x_blocks.shape[1])
    for dy_token, x_token in zip(dy_blocks, x_blocks, strict=True):
        for r in range(trace.shape[0]):
            for c in range(trace.shape[1]):
                trace[r, c] += torch.outer(dy_token[r], x_token[c]).square().sum()
    return trace


class ReferenceBackend(Backend):
    """The reference behind the operator: `backend="reference"`. Never chosen by itself."""

    name = "reference"

    def forward(self, x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern) -> Tensor:
        check_columns(pattern)
        return forward(x, values, pattern.col_indices, bias, pattern.num_live)

    def grad_input(self, dy: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
        check_columns(pattern)
        return grad_input(dy, values, pattern.col_indices, pattern.C, pattern.num_live)

    def grad_values(self, dy: Tensor, x: Tensor, pattern: Pattern) -> Tensor:
        check_columns(pattern)
        return grad_values(dy, x, pattern.col_indices, pattern.B, pattern.num_live)

    def block_grad_norms(self, dy: Tensor, x: Tensor, B: int) -> Tensor:
        return block_grad_norms(dy, x, B).square()

    def grad_values_and_norms(
        self, dy: Tensor, x: Tensor, pattern: Pattern
    ) -> tuple[Tensor, Tensor]:
        return self.grad_values(dy, x, pattern), self.block_grad_norms(dy, x, pattern.B)


BACKEND = ReferenceBackend()
