"""Block-ELL linear by scattering the tiles into a dense buffer and calling BLAS once.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.

Runs on any device and is the fallback everywhere: it costs one dense product plus the traffic of
the weight. The buffer lives for the duration of one call, or from a forward pass to its backward.
"""

from __future__ import annotations

import math
import threading
from types import ModuleType

import torch
from torch import Tensor

from blockell_kernels._backends import Backend, Pattern
from blockell_kernels._gpu import gpu_blocks
from blockell_kernels._stats import block_grad_norms_sq, norms_sq_of_rows, rows_per_chunk

WHOLE_GRADIENT_BYTES = 2**24
"""Below this size a dense gradient is computed whole at any density."""


_thread = threading.local()


def _prepare_thread(t: Tensor) -> None:
    """Give a thread of autograd's a CUDA context: cuBLAS warns if it has to do so itself."""
    if t.is_cuda and not getattr(_thread, "prepared", False):
        torch.cuda.Event().record()
        _thread.prepared = True


def check_columns(pattern: Pattern) -> None:
    """Raise IndexError for a column outside [0, C), on the CPU, where looking costs nothing.

    Elsewhere it would wait for the device; such a column then falls into another block row, or is
    caught by the device's own bounds check.
    """
    if pattern.col_indices.device.type == "cpu":
        low, high = (int(bound) for bound in torch.aminmax(pattern.live))
        if low < 0 or high >= pattern.C:
            raise IndexError(
                f"col_indices holds column {low if low < 0 else high}, out of range [0, "
                f"{pattern.C}); check_topology names the row and slot."
            )


def to_dense(values: Tensor, pattern: Pattern) -> Tensor:
    """W [R*B, C*B] from values [R, slots, B, B].

    Whole tiles are placed first and reordered second: twice as fast as placing B-wide lines.
    """
    if kernels := gpu_blocks(values, pattern.B):
        return kernels.to_dense(values, pattern)
    check_columns(pattern)
    R, C, B, K = pattern.R, pattern.C, pattern.B, pattern.num_live
    first = torch.arange(0, R * C, C, device=values.device)
    position = (pattern.live + first[:, None]).reshape(-1)  # int64 [R*K] in the grid of blocks
    blocks = values.new_zeros(R * C, B * B)
    blocks.index_copy_(0, position, values[:, :K].reshape(R * K, B * B))
    return blocks.view(R, C, B, B).transpose(1, 2).reshape(R * B, C * B)


def gather_blocks(dense: Tensor, pattern: Pattern, start: int, stop: int) -> Tensor:
    """The present blocks [stop-start, K, B, B] of block rows start..stop, `dense` [rows*B, C*B]."""
    C, B, K, rows = pattern.C, pattern.B, pattern.num_live, stop - start
    # line ids of the B-wide lines of `dense`: row r, inner row i, column block c -> (r*B + i)*C + c
    line = torch.arange(0, rows * B * C, C, device=dense.device).view(rows, 1, B)
    line = line + pattern.live[start:stop, :, None]
    return dense.view(-1, B).index_select(0, line.view(-1)).view(rows, K, B, B)


class DenseBackend(Backend):
    """Scatter, then one dense product per direction."""

    name = "dense"

    def weight(self, values: Tensor, pattern: Pattern) -> Tensor:
        """W [R*B, C*B], for the two products below."""
        return to_dense(values, pattern)

    def forward_by(self, weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """`forward` by a weight that is dense already."""
        return torch.nn.functional.linear(x, weight, bias)

    def grad_input_by(self, weight: Tensor, dy: Tensor) -> Tensor:
        """`grad_input` by a weight that is dense already."""
        _prepare_thread(dy)
        return torch.mm(dy, weight)

    def forward(self, x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern) -> Tensor:
        return self.forward_by(to_dense(values, pattern), x, bias)

    def grad_input(self, dy: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
        return self.grad_input_by(to_dense(values, pattern), dy)

    def grad_values(self, dy: Tensor, x: Tensor, pattern: Pattern) -> Tensor:
        if kernels := gpu_blocks(x, pattern.B):
            _prepare_thread(x)
            chunks = grad_chunks(pattern, x.element_size())
            if chunks == 1:
                return kernels.from_dense(torch.mm(dy.T, x), pattern)
            return _grad_values_by_chunks(kernels, dy, x, pattern, chunks)
        check_columns(pattern)
        blocks = gather_blocks(dy.T @ x, pattern, 0, pattern.R)
        return with_spare_slots(blocks, pattern)


def grad_chunks(pattern: Pattern, element_bytes: int) -> int:
    """Into how many chunks of rows the dense gradient is cut on a GPU.

    A step holds the tiles, their gradient and the dense gradient of one chunk: together not more
    than a dense layer's weight and gradient, up to 90% density. Small weights are left whole.
    """
    whole = pattern.R * pattern.C * pattern.B**2 * element_bytes
    dead = 1 - pattern.num_live / pattern.C
    if whole < WHOLE_GRADIENT_BYTES or dead < 0.1:
        return 1
    return min(pattern.R, math.ceil(1.05 / (2 * dead)))  # 5%: indices, rounding up to whole rows


def _grad_values_by_chunks(
    kernels: ModuleType, dy: Tensor, x: Tensor, pattern: Pattern, chunks: int
) -> Tensor:
    R, B, cols = pattern.R, pattern.B, pattern.col_indices
    out = x.new_empty(R, pattern.slots, B, B)
    step = -(-R // chunks)
    for start in range(0, R, step):
        rows = pattern._replace(col_indices=cols[start : start + step])
        part = dy[:, start * B : (start + step) * B].T
        # Unnamed: a product is not in memory any more when the next one is computed.
        kernels.from_dense(torch.mm(part, x), rows, out=out[start : start + step])
    return out


def grad_values_and_norms(dy: Tensor, x: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """dv [R, slots, B, B] and squared norms [R, C], from a few block rows of dy^T x at a time."""
    if gpu_blocks(x, pattern.B):
        return BACKEND.grad_values(dy, x, pattern), block_grad_norms_sq(dy, x, pattern.B)
    check_columns(pattern)
    B, R = pattern.B, pattern.R
    blocks, norms = [], []
    step = rows_per_chunk(R, pattern.C, B)
    for start in range(0, R, step):
        stop = min(R, start + step)
        product = dy[:, start * B : stop * B].T @ x
        blocks.append(gather_blocks(product, pattern, start, stop))
        norms.append(norms_sq_of_rows(product, B))
    return with_spare_slots(torch.cat(blocks), pattern), torch.cat(norms)


def with_spare_slots(blocks: Tensor, pattern: Pattern) -> Tensor:
    """[R, K, B, B] -> [R, slots, B, B], zeros in spare slots."""
    spare = pattern.slots - pattern.num_live
    return torch.nn.functional.pad(blocks, (0, 0, 0, 0, 0, spare)) if spare else blocks


BACKEND = DenseBackend()
