"""Launches the kernels that move or measure whole blocks.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blockell_kernels._backends import Pattern
from blockell_kernels._triton._block_kernels import (
    block_norms,
    expand_blocks,
    gather_blocks,
    index_column,
    pack_rows,
    scatter_blocks,
    square_sums,
)
from blockell_kernels._triton._device import dot_precision, num_sms, on_its_device, upcast
from blockell_kernels._triton._launch import launch
from blockell_kernels._triton._replay import replayed
from blockell_kernels._triton._tiling import ceil_div, round_up_to_power_of_two

# Elements of a program's output in the kernels that only move data.
_ELEMENTS = 4096
# From this size on, by tile, a dense weight is written once, by programs that look up who fills
# their columns, and not zeroed first: 51 to 60 us instead of 70 to 83 for 4096 x 14336 half full.
# They are few where tiles are large: 16 us instead of 9 for 2048 x 2048 in tiles of 128.
_LARGE_WEIGHT = {8: 2**22, 16: 2**22, 32: 2**22, 64: 2**23, 128: 3 * 2**22}
_EXPANDED = {8: (8, 128, 4), 16: (8, 64, 4), 32: (16, 16, 4), 64: (8, 8, 4), 128: (8, 4, 4)}
"""Lines at a time, block columns and warps of a program, by tile."""


@replayed
@on_its_device
def to_dense(values: Tensor, pattern: Pattern) -> Tensor:
    """W [R*B, C*B] from values [R, slots, B, B], in one launch."""
    R, C, B = pattern.R, pattern.C, pattern.B
    dense = values.new_empty(R * B, C * B)
    if dense.numel() >= _LARGE_WEIGHT[B]:
        LINES, columns, warps = _EXPANDED[B]
        chunks = ceil_div(C, columns)
        place = torch.empty(R * chunks * columns, dtype=torch.int32, device=values.device)
        launch(
            expand_blocks,
            (R * chunks,),
            values,
            pattern.col_indices,
            dense,
            place,
            pattern.slots,
            pattern.num_live,
            C,
            chunks,
            B=B,
            LINES=LINES,
            CB=columns,
            KB=256,
            num_warps=warps,
        )
        return dense
    # As few lines per program as it takes to occupy the GPU.
    LINES = B
    while LINES > 2 and 2 * num_sms(values.device) > R * B // LINES:
        LINES //= 2
    KB = max(1, min(round_up_to_power_of_two(pattern.num_live), _ELEMENTS // (LINES * B)))
    launch(
        scatter_blocks,
        (R, B // LINES),
        values,
        pattern.col_indices,
        dense,
        pattern.slots,
        pattern.num_live,
        C,
        B=B,
        LINES=LINES,
        KB=KB,
        ZEROS=min(_ELEMENTS, round_up_to_power_of_two(LINES * C * B)),
        num_warps=4,
    )
    return dense


def pack(values: Tensor, pattern: Pattern, multiple: int) -> Tensor:
    """[R*B, width]: the live blocks of every row side by side, zeros up to a multiple."""
    R, B, K = pattern.R, pattern.B, pattern.num_live
    width = ceil_div(K * B, multiple) * multiple
    packed = torch.empty(R * B, width, dtype=values.dtype, device=values.device)
    KB = max(1, min(round_up_to_power_of_two(width // B), _ELEMENTS // (B * B)))
    grid = (R, ceil_div(width, KB * B))
    launch(pack_rows, grid, values, packed, pattern.slots, K, width, B=B, KB=KB)
    return packed


@replayed
@on_its_device
def from_dense(dense: Tensor, pattern: Pattern, out: Tensor | None = None) -> Tensor:
    """The present blocks [R, slots, B, B] of a dense [R*B, C*B]; zeros in the spare slots."""
    R, B, slots = pattern.R, pattern.B, pattern.slots
    if out is None:
        out = dense.new_empty(R, slots, B, B)
    KB = max(1, min(round_up_to_power_of_two(slots), _ELEMENTS // (B * B)))
    chunks = ceil_div(slots, KB)
    launch(
        gather_blocks,
        (R * chunks,),
        dense,
        pattern.col_indices,
        out,
        slots,
        pattern.num_live,
        pattern.C,
        chunks,
        B=B,
        KB=KB,
        num_warps=4 if B < 128 else 8,
    )
    return out


@on_its_device
def transposed(col_indices: Tensor, C: int) -> tuple[Tensor, Tensor]:
    """`blockell_format.transposed_index` of col_indices [R, slots] in one launch."""
    entries = col_indices.numel()
    order = col_indices.new_empty(entries)
    col_start = col_indices.new_empty(C + 1)
    launch(
        index_column,
        (C + 1,),
        col_indices.contiguous(),
        order,
        col_start,
        entries,
        C,
        BLOCK=1024,
        num_warps=4,
    )
    return order, col_start


@on_its_device
def block_norms_sq(dy: Tensor, x: Tensor, B: int) -> Tensor:
    """float32 [R, C]: ||dy_r^T x_c||_F^2 of all blocks; the product stays in registers."""
    R, C = dy.shape[1] // B, x.shape[1] // B
    out = torch.empty(R, C, dtype=torch.float32, device=x.device)
    side = 128 if x.element_size() == 2 else 64
    side = min(side, max(16, round_up_to_power_of_two(min(R, C) * B)))
    blocks = max(1, side // B)
    row_tiles = ceil_div(R, blocks)
    launch(
        block_norms,
        (row_tiles * ceil_div(C, blocks),),
        dy,
        x,
        out,
        x.shape[0],
        R,
        C,
        row_tiles,
        dy.stride(0),
        dy.stride(1),
        x.stride(0),
        x.stride(1),
        B=B,
        RB=blocks,
        CB=blocks,
        BT=64 if x.element_size() == 2 else 32,
        PRECISION=dot_precision(x.dtype, x.device),
        UPCAST=upcast(x),
        num_warps=8 if blocks * B >= 128 else 4,
        num_stages=3,
    )
    return out


@on_its_device
def block_sums_sq(t: Tensor, B: int) -> Tensor:
    """float32 [M]: sum over tokens of |t_m|^2 per block of t [N, M*B], in one pass."""
    N, M = t.shape[0], t.shape[1] // B
    MB = max(1, 128 // B)
    tiles = ceil_div(M, MB)
    tokens = ceil_div(ceil_div(N, max(1, 4 * num_sms(t.device) // tiles)), 32) * 32
    parts = max(1, ceil_div(N, max(tokens, 1)))
    sums = torch.empty(parts, M, dtype=torch.float32, device=t.device)
    launch(
        square_sums,
        (tiles, parts),
        t,
        sums,
        N,
        M,
        tokens,
        t.stride(0),
        t.stride(1),
        B=B,
        MB=MB,
        BT=32,
        num_warps=4,
    )
    return sums.sum(0)
