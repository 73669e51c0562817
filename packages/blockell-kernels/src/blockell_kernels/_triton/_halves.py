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
    split_columns,
    split_rows,
    token_peaks,
)
from blockell_kernels._triton._launch import launch
from blockell_kernels._triton._tiling import ceil_div
from blockell_kernels._triton._tilings_halves import DEPTH

LINES, WIDTH = 8, 512
"""Rows (or columns) of the weight that one program splits, and elements of each at a time."""
TOKENS = 16
"""That one program looks through."""


def _empty_halves(rows: int, width: int, scattered: bool, device: torch.device) -> Tensor:
    make = torch.zeros if scattered else torch.empty
    return make(2, rows, width, dtype=torch.float16, device=device)


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
    R, B, K, columns = pattern.R, pattern.B, pattern.num_live, pattern.C * pattern.B
    width = columns if scattered else ceil_div(K * B, DEPTH) * DEPTH
    halves = _empty_halves(R * B, width, scattered, values.device)
    numbers = torch.empty(R * B + 1 + columns, dtype=torch.float32, device=values.device)
    found = Halves(halves, numbers[: R * B], numbers[R * B :])
    launch(
        split_rows,
        (R, B // LINES),
        values,
        *halves,
        *found[1:],
        _column_peaks(values, pattern, None),
        pattern.col_indices,
        pattern.slots,
        K,
        width,
        columns,
        B=B,
        LINES=LINES,
        KB=WIDTH // B,
        SCATTERED=scattered,
        num_warps=4,
    )
    return found


def split_by_column(values: Tensor, pattern: Pattern, scattered: bool) -> Halves:
    """Scaled by column, else as `split_by_row`, without the zeros."""
    R, B, K, columns = pattern.R, pattern.B, pattern.num_live, pattern.C * pattern.B
    width = columns if scattered else K * B
    halves = _empty_halves(R * B, width, scattered, values.device)
    numbers = torch.empty(columns + 1 + 2 * R * B, dtype=torch.float32, device=values.device)
    factors, lifts, peaks = numbers.split([columns, 1 + R * B, R * B])
    launch(
        row_peaks,
        (R, B // LINES),
        values,
        peaks,
        pattern.slots,
        K,
        B=B,
        LINES=LINES,
        KB=WIDTH // B,
        num_warps=4,
    )
    launch(
        split_columns,
        (R, B // LINES, ceil_div(K * B, WIDTH)),
        values,
        *halves,
        factors,
        lifts,
        peaks,
        _column_peaks(values, pattern, peaks),
        pattern.col_indices,
        pattern.slots,
        K,
        width,
        R * B,
        columns,
        B=B,
        LINES=LINES,
        KB=WIDTH // B,
        SCATTERED=scattered,
        num_warps=4,
    )
    return Halves(halves, factors, lifts)


def _column_peaks(values: Tensor, pattern: Pattern, rows: Tensor | None) -> Tensor:
    """float32 [C*B]: the largest sizes, of weights lifted by the peaks of the rows if given."""
    B = pattern.B
    peaks = torch.zeros(pattern.C * B, dtype=torch.int32, device=values.device)
    launch(
        column_peaks,
        (pattern.R, ceil_div(pattern.num_live * B, WIDTH)),
        values,
        peaks,
        pattern.col_indices,
        rows,
        pattern.slots,
        pattern.num_live,
        pattern.R * B,
        B=B,
        KB=WIDTH // B,
        num_warps=4,
    )
    return peaks.view(torch.float32)


class Peaks(NamedTuple):
    """The largest sizes of the tokens of dy or x."""

    peaks: Tensor
    """float32 [N]."""
    extremes: Tensor
    """int32 [2]: the largest exponent, and 255 less the smallest."""
    of_x: bool


def peaks_of_tokens(dy: Tensor, x: Tensor) -> Peaks:
    """Of dy [N, R*B] or x [N, C*B], whichever has fewer elements."""
    of_x = x.shape[1] <= dy.shape[1]
    t = x if of_x else dy
    N = t.shape[0]
    peaks = torch.empty(N, dtype=torch.float32, device=t.device)
    extremes = torch.zeros(2, dtype=torch.int32, device=t.device)
    launch(
        token_peaks,
        (ceil_div(N, TOKENS),),
        t,
        peaks,
        extremes,
        N,
        t.shape[1],
        t.stride(0),
        BT=TOKENS,
        BW=WIDTH // 2,
        num_warps=4,
    )
    return Peaks(peaks, extremes, of_x)
