"""Launches the weight gradient.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blockell_kernels._backends import Pattern
from blockell_kernels._gluon import _grad_values as _by_items
from blockell_kernels._gluon import _halves
from blockell_kernels._gluon import _streamed_values as _streamed
from blockell_kernels._triton._arithmetic import arithmetic
from blockell_kernels._triton._device import describable, num_sms, on_its_device
from blockell_kernels._triton._grad_values_kernels import (
    grad_values_descriptors,
    grad_values_pointers,
    reduce_parts,
)
from blockell_kernels._triton._launch import descriptor, launch
from blockell_kernels._triton._tiling import (
    Tiling,
    ceil_div,
    power_of_two_divisor,
    round_up_to_power_of_two,
)

# Fewer tokens than this per part cost more in partial sums than they gain in parallelism.
MIN_TOKENS_PER_PART = 256
SHARED_BYTES = 227 * 1024
"""Of a multiprocessor of Hopper; only that generation overlaps launches."""


@on_its_device
def grad_values(dy: Tensor, x: Tensor, pattern: Pattern, tiling: Tiling) -> Tensor:
    """dv [R, slots, B, B] from dy [N, R*B] and x [N, C*B]; zeros in the spare slots."""
    N, (R, slots, B, K) = x.shape[0], (pattern.R, pattern.slots, pattern.B, pattern.num_live)
    out = torch.empty(R, slots, B, B, dtype=x.dtype, device=x.device)
    if N == 0:
        return out.zero_()
    for gluon in (_by_items, _streamed):
        if gluon.takes(dy, x, pattern, tiling):
            if slots > K:
                out[:, K:].zero_()
            gluon.grad_values(dy, x, out, pattern, tiling)
            return out
    by_halves = _halves.takes_gradient(dy, x, pattern, tiling)
    if by_halves and tiling.path == "dense halves":
        return _halves.grad_values_of_dense(dy, x, out, pattern, tiling)
    if not by_halves:
        tiling = tiling.otherwise or tiling
    by_descriptors = (
        tiling.path == "descriptors"
        and tiling.BN in (B, 2 * B)
        and B >= 16
        and describable(dy)
        and describable(x)
    )
    BR = min(tiling.BM, power_of_two_divisor(pattern.row_group * B))
    NB = min(max(tiling.BN // B, 1), round_up_to_power_of_two(K))  # blocks per program
    if not by_descriptors:
        NB = max(NB, 16 // B)
    row_tiles = R * B // BR
    tiles = row_tiles * ceil_div(K, NB)
    if by_halves:
        tokens_per_part = _halves.tokens_per_part(N, R * B, K * B, x.device)
    else:
        tokens_per_part = _tokens_per_part(N, tiles, tiling, x.device)
    parts = ceil_div(N, tokens_per_part)
    partial = parts > 1 or slots > K
    target = x.new_empty(parts, R, K, B, B, dtype=torch.float32) if partial else out
    run = _by_halves if by_halves else _by_descriptors if by_descriptors else _by_pointers
    run(dy, x, target, pattern, tiling, (tiles, parts), BR, NB, row_tiles, tokens_per_part)
    if partial:
        rounded = round_up_to_power_of_two(parts)
        block = min(max(4096 // rounded, 256), round_up_to_power_of_two(slots * B * B))
        launch(
            reduce_parts,
            (R, ceil_div(slots * B * B, block)),
            target,
            out,
            parts,
            R * K,
            K,
            slots,
            BB=B * B,
            PARTS=rounded,
            BLOCK=block,
        )
    return out


def _tokens_per_part(N: int, tiles: int, tiling: Tiling, device: torch.device) -> int:
    """Tokens of one part, in whole steps: as many parts as asked for, or fill `waves` rounds."""
    if tiling.parts:
        return ceil_div(ceil_div(N, tiling.parts), tiling.BK) * tiling.BK
    parts = max(1, tiling.waves * num_sms(device) // tiles)
    tokens = max(ceil_div(N, parts), min(MIN_TOKENS_PER_PART, N))
    return ceil_div(tokens, tiling.BK) * tiling.BK


def _start(
    grid: tuple[int, int], rows: int, columns: int, tiling: Tiling, t: Tensor
) -> dict[str, bool]:
    """Constants of the launch: whether to wait for the end of the kernel before.

    A grid may be cut so that all multiprocessors get equally many programs at once. Launched while
    another kernel ends, as many as fit crowd on those that are free first: three instead of two in
    tile 64 with free rows, which took half as long again.
    """
    bytes_of_one = tiling.stages * tiling.BK * (rows + columns) * t.element_size()
    fit = SHARED_BYTES // bytes_of_one
    sms = num_sms(t.device)
    waves = ceil_div(grid[0] * grid[1], sms) if tiling.parts else tiling.waves
    evenly = grid[0] * grid[1] <= waves * sms
    return {"OVERLAPS": False} if evenly and fit > waves else {}


def _by_pointers(
    dy: Tensor,
    x: Tensor,
    target: Tensor,
    pattern: Pattern,
    tiling: Tiling,
    grid: tuple[int, int],
    BR: int,
    NB: int,
    row_tiles: int,
    tokens_per_part: int,
) -> None:
    launch(
        grad_values_pointers,
        grid,
        dy,
        x,
        pattern.col_indices,
        target,
        x.shape[0],
        pattern.slots,
        pattern.num_live,
        target.shape[-3],
        pattern.R * target.shape[-3],
        row_tiles,
        tokens_per_part,
        dy.stride(0),
        dy.stride(1),
        x.stride(0),
        x.stride(1),
        B=pattern.B,
        BR=max(BR, 16),
        BR_LIVE=BR,
        NB=NB,
        BT=tiling.BK,
        **arithmetic(x, tiling),
        **_start(grid, BR, NB * pattern.B, tiling, x),
    )


def _by_descriptors(
    dy: Tensor,
    x: Tensor,
    target: Tensor,
    pattern: Pattern,
    tiling: Tiling,
    grid: tuple[int, int],
    BR: int,
    NB: int,
    row_tiles: int,
    tokens_per_part: int,
) -> None:
    B, BT = pattern.B, tiling.BK
    launch(
        grad_values_descriptors,
        grid,
        descriptor(dy, [BT, BR]),
        descriptor(x, [BT, B]),
        pattern.col_indices,
        target,
        x.shape[0],
        pattern.slots,
        pattern.num_live,
        target.shape[-3],
        pattern.R * target.shape[-3],
        row_tiles,
        tokens_per_part,
        B=B,
        BR=BR,
        NB=NB,
        BT=BT,
        **arithmetic(x, tiling),
        **_start(grid, BR, NB * B, tiling, x),
    )


def _by_halves(
    dy: Tensor,
    x: Tensor,
    target: Tensor,
    pattern: Pattern,
    tiling: Tiling,
    grid: tuple[int, int],
    BR: int,
    NB: int,
    row_tiles: int,
    tokens_per_part: int,
) -> None:
    parts = target if target.ndim == 5 else target[None]
    _halves.grad_values(dy, x, parts, pattern, tiling, tokens_per_part)
