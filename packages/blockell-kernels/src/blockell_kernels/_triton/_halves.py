"""Writes a float32 weight as two float16 halves.

Legend: R block rows, C block columns, K live blocks per row, B tile side.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from blockell_kernels._backends import Pattern
from blockell_kernels._triton._halves_kernels import (
    column_peaks,
    row_peaks,
    split_blocks,
)
from blockell_kernels._triton._launch import launch
from blockell_kernels._triton._tiling import ceil_div
from blockell_kernels._triton._tilings_halves import DEPTH

LINES, WIDTH = 8, 512
"""Rows (or columns) of the weight that one program splits, and elements of each at a time."""
PEAK_LINES, PEAK_WIDTH = 32, 128
"""Of the weight, that one program finds the peaks of columns in."""


class Halves(NamedTuple):
    """A weight as high + low, times the factors of its rows or columns."""

    halves: Tensor
    """float16 [2, R*B, width]: high and low."""
    factors: Tensor
    """float32 [R*B], or [C*B]."""
    lifts: Tensor
    """float32 [1 + C*B], or [1 + R*B]: whether x (or dy) is to be multiplied by the rest of it."""


def split_by_row(values: Tensor, pattern: Pattern, scattered: bool) -> Halves:
    """Scaled by row: the live blocks side by side, with zeros up to a multiple of a step.

    Scattered, each in its place in the dense weight [R*B, C*B].
    """
    rows = _row_peaks(values, pattern, None)
    columns = _column_peaks(values, pattern, rows)
    return _split(values, pattern, rows, columns, scattered, by_row=True)


def split_by_column(values: Tensor, pattern: Pattern, scattered: bool) -> Halves:
    """Scaled by column, else as `split_by_row`."""
    columns = _column_peaks(values, pattern, None)
    rows = _row_peaks(values, pattern, columns)
    return _split(values, pattern, columns, rows, scattered, by_row=False)


def _row_peaks(values: Tensor, pattern: Pattern, columns: Tensor | None) -> Tensor:
    """float32 [R*B]: the largest size in every row, relative to those of the columns if given."""
    R, B = pattern.R, pattern.B
    peaks = torch.empty(R * B, dtype=torch.float32, device=values.device)
    launch(
        row_peaks,
        (R, B // LINES),
        values,
        peaks,
        pattern.col_indices,
        columns,
        pattern.slots,
        pattern.num_live,
        B=B,
        LINES=LINES,
        KB=WIDTH // B,
        num_warps=4,
    )
    return peaks


def _column_peaks(values: Tensor, pattern: Pattern, rows: Tensor | None) -> Tensor:
    """float32 [C*B]: the largest size in every column, relative to those of the rows if given."""
    R, B, K = pattern.R, pattern.B, pattern.num_live
    peaks = torch.zeros(pattern.C * B, dtype=torch.int32, device=values.device)
    lines, width = min(B, PEAK_LINES), max(B, PEAK_WIDTH)
    launch(
        column_peaks,
        (R, B // lines, ceil_div(K * B, width)),
        values,
        peaks,
        pattern.col_indices,
        rows,
        pattern.slots,
        K,
        B=B,
        LINES=lines,
        KB=width // B,
        num_warps=4,
    )
    return peaks.view(torch.float32)


def _split(
    values: Tensor,
    pattern: Pattern,
    peaks: Tensor,
    others: Tensor,
    scattered: bool,
    by_row: bool,
) -> Halves:
    R, B, K = pattern.R, pattern.B, pattern.num_live
    width = pattern.C * B if scattered else ceil_div(K * B, DEPTH) * DEPTH
    make = torch.zeros if scattered else torch.empty
    halves = make(2, R * B, width, dtype=torch.float16, device=values.device)
    length, rest = peaks.numel(), others.numel()
    numbers = torch.empty(length + 1 + rest, dtype=torch.float32, device=values.device)
    found = Halves(halves, numbers[:length], numbers[length:])
    launch(
        split_blocks,
        (R, B // LINES, ceil_div(K * B if scattered else width, WIDTH)),
        values,
        *halves,
        *found[1:],
        peaks,
        others,
        pattern.col_indices,
        pattern.slots,
        K,
        width,
        length,
        rest,
        B=B,
        LINES=LINES,
        KB=WIDTH // B,
        BY_ROW=by_row,
        SCATTERED=scattered,
        num_warps=4,
    )
    return found
