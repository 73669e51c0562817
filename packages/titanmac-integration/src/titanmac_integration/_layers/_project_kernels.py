# mypy: ignore-errors
"""A Triton kernel that sums the columns of a matrix, in float32 and always in the same order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 32, 128
"""A program reads tiles of this size."""
TILES = 8
"""Tiles below each other that a program adds up."""

PART_ROWS, PART_COLUMNS = 128, 16
"""The tiles of the sum over programs."""


@triton.jit
def _bias_gradient(
    x_ptr,  # [N, C], rows contiguous
    parts_ptr,  # float32 [programs, C]
    stride,
    N,
    C,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
):
    part = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    gathered = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(TILES):
        row = (part.to(tl.int64) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        there = (row < N)[:, None] & (column < C)[None, :]
        x = tl.load(x_ptr + row[:, None] * stride + column[None, :], there, other=0.0)
        gathered += x.to(tl.float32)
    total = tl.sum(gathered, 0)
    tl.store(parts_ptr + part.to(tl.int64) * C + column, total, column < C)


@triton.jit
def _sum_parts(
    parts_ptr,  # float32 [P, C]
    total_ptr,  # float32 [C]
    P,
    C,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    gathered = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, P, ROWS):
        row = first + tl.arange(0, ROWS)
        there = (row < P)[:, None] & (column < C)[None, :]
        gathered += tl.load(parts_ptr + row[:, None] * C + column[None, :], there, other=0.0)
    tl.store(total_ptr + column, tl.sum(gathered, 0), column < C)


def sum_parts(parts: Tensor) -> Tensor:
    """Contiguous float32 [P, C] -> [C]: few columns to a program, for there are few of them."""
    P, C = parts.shape
    total = torch.empty(C, dtype=torch.float32, device=parts.device)
    if C:
        _sum_parts[(triton.cdiv(C, PART_COLUMNS),)](
            parts, total, P, C, ROWS=PART_ROWS, COLUMNS=PART_COLUMNS, num_warps=8
        )
    return total


def column_sums(x: Tensor) -> Tensor:
    """[N, C] of float32, bfloat16 or float16 -> float32 [C]."""
    if x.stride(1) != 1:
        x = x.contiguous()
    N, C = x.shape
    programs = triton.cdiv(N, ROWS * TILES)
    parts = torch.empty(programs, C, dtype=torch.float32, device=x.device)
    if programs:
        grid = (triton.cdiv(C, COLUMNS), programs)
        _bias_gradient[grid](x, parts, x.stride(0), N, C, ROWS=ROWS, COLUMNS=COLUMNS, TILES=TILES)
    return sum_parts(parts)
