"""Block-ELL linear by scattering the tiles into a dense buffer and calling BLAS once.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.

Runs on any device and is the fallback everywhere: it costs one dense product plus the traffic of
the weight. The buffer lives for the duration of one call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blockell_kernels._backends import Backend, Pattern
from blockell_kernels._stats import norms_sq_of_rows, rows_per_chunk


def flat_positions(pattern: Pattern) -> Tensor:
    """int64 [R*K]: where each live block lies in the [R*C] grid of blocks."""
    live = pattern.live.long()
    rows = torch.arange(0, pattern.R * pattern.C, pattern.C, device=live.device)
    return (live + rows[:, None]).reshape(-1)


def to_dense(values: Tensor, pattern: Pattern) -> Tensor:
    """W [R*B, C*B] from values [R, slots, B, B]."""
    R, C, B = pattern.R, pattern.C, pattern.B
    dense = values.new_zeros(R, B, C, B)
    rows = torch.arange(R, device=values.device)[:, None].expand(R, pattern.num_live)
    dense.permute(0, 2, 1, 3)[rows, pattern.live.long()] = values[:, : pattern.num_live]
    return dense.view(R * B, C * B)


def gather_blocks(dense: Tensor, pattern: Pattern, out: Tensor, start: int, stop: int) -> None:
    """Copy the present blocks of block rows start..stop of W-shaped `dense` into `out`.

    `dense` is [(stop-start)*B, C*B]; `out` is [R, slots, B, B].
    """
    C, B = pattern.C, pattern.B
    blocks = dense.view(stop - start, B, C, B).permute(0, 2, 1, 3)
    rows = torch.arange(stop - start, device=dense.device)[:, None]
    out[start:stop, : pattern.num_live] = blocks[rows, pattern.live[start:stop].long()]


class DenseBackend(Backend):
    """Scatter, then one dense product per direction."""

    name = "dense"

    def forward(self, x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern) -> Tensor:
        return torch.nn.functional.linear(x, to_dense(values, pattern), bias)

    def grad_input(self, dy: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
        return dy @ to_dense(values, pattern)

    def grad_values(self, dy: Tensor, x: Tensor, pattern: Pattern) -> Tensor:
        out = x.new_zeros(pattern.R, pattern.slots, pattern.B, pattern.B)
        gather_blocks(dy.T @ x, pattern, out, 0, pattern.R)
        return out

    def grad_values_and_norms(
        self, dy: Tensor, x: Tensor, pattern: Pattern
    ) -> tuple[Tensor, Tensor]:
        B, R = pattern.B, pattern.R
        out = x.new_zeros(R, pattern.slots, B, B)
        norms = torch.empty(R, pattern.C, dtype=torch.float32, device=x.device)
        if x.dtype in (torch.float16, torch.bfloat16):
            dy, x = dy.float(), x.float()
        step = rows_per_chunk(R, pattern.C, B)
        for start in range(0, R, step):
            stop = min(R, start + step)
            product = dy[:, start * B : stop * B].T @ x
            gather_blocks(product, pattern, out, start, stop)
            norms[start:stop] = norms_sq_of_rows(product, B)
        return out, norms


BACKEND = DenseBackend()
