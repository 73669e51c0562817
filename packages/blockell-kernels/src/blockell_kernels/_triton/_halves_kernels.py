# mypy: ignore-errors
"""Triton kernels that write a float32 weight as two float16 halves.

Legend: R block rows, C block columns, K live blocks per row, B tile side.

w = factor * (high + low): the factor is a power of two, so it is exact, and brings the largest
weight of a row (or column) to between 2**14 and 2**15, where neither float16 overflows nor the low
half of any weight above 2**-18 of the largest one underflows. 22 bits of every such weight are
kept, and of smaller ones all bits above 2**-40 of the largest. What is not finite goes into the low
half: in the high one it would meet low halves of both signs, and infinity would become NaN.

A small weight that lost bits matters if a large x multiplies it. So where the columns of a weight
that is scaled by row differ much (the rows, if it is scaled by column), w is divided by powers of
two by column as well, by which x will be multiplied: `lifted`. A column's size is that of its
weights relative to the largest of their rows; every row and column of what is left has a largest
weight of about 1, and the scale of a row stays what it was.

The method is that of Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores
while surpassing the FP32 theoretical peak performance", 2022, but scaled by row.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MUCH = tl.constexpr(12)


@triton.jit
def scales(largest):
    """(scale, 1/scale): powers of two, |w| <= largest times scale is below 2**15.

    Denormal numbers are scaled by 2**126, which brings them into float16's range.
    """
    exponent = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) & 255, 15)
    scale = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    inverse = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
    return scale, inverse


@triton.jit
def halves(w):
    """(high, low) of scaled w, in float16."""
    high = tl.where(tl.abs(w) < float("inf"), w.to(tl.float16), 0.0)
    return high, (w - high.to(tl.float32)).to(tl.float16)


@triton.jit
def lift_of(peak):
    """The power of two that brings a peak to between 1 and 2."""
    return scales(peak)[0] * 0.00006103515625


@triton.jit
def sizes(w):
    """Absolute values, of what is finite."""
    size = tl.abs(w)
    return tl.where(size < float("inf"), size, 0.0)


@triton.jit
def lifted(peaks_ptr, length, BLOCK: tl.constexpr):
    """Whether peaks differ by more than 2**`MUCH`; zeros aside."""
    low, high = 255, 0
    for start in range(0, length, BLOCK):
        n = start + tl.arange(0, BLOCK)
        peak = tl.load(peaks_ptr + n, n < length, other=0.0)
        exponent = (peak.to(tl.int32, bitcast=True) >> 23) & 255
        low = tl.minimum(low, tl.min(tl.where(peak > 0, exponent, 255), axis=0))
        high = tl.maximum(high, tl.max(exponent, axis=0))
    return high - low > MUCH


@triton.jit
def row_peaks(
    values_ptr,  # float32 [R, slots, B, B]
    peaks_ptr,  # float32 [R*B]
    cols_ptr,  # [R, slots]
    columns_ptr,  # float32 [C*B]: the peaks of the columns, or None
    slots,
    num_live,
    B: tl.constexpr,
    LINES: tl.constexpr,  # rows per program; divides B
    KB: tl.constexpr,  # blocks per step
    OVERLAPS: tl.constexpr = False,
):
    """The largest size in every row, relative to those of the columns if these are given."""
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    r = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * LINES + tl.arange(0, LINES)
    n = tl.arange(0, KB * B)
    source = values_ptr + r * slots * (B * B) + i[:, None] * B + (n // B * (B * B) + n % B)[None, :]
    largest = tl.zeros((LINES,), tl.float32)
    for k in range(0, num_live, KB):
        live = k + n // B < num_live
        w = tl.load(source + k * (B * B), live[None, :], other=0.0)
        if columns_ptr is not None:
            c = tl.load(cols_ptr + r * slots + k + n // B, live, other=0)
            w *= lift_of(tl.load(columns_ptr + c * B + n % B, live, other=1.0))[None, :]
        largest = tl.maximum(largest, tl.max(sizes(w), axis=1))
    tl.store(peaks_ptr + r * B + i, largest)


@triton.jit
def column_peaks(
    values_ptr,  # float32 [R, slots, B, B]
    peaks_ptr,  # int32 [C*B]: the bits of floats, zeros before
    cols_ptr,  # [R, slots]
    rows_ptr,  # float32 [R*B]: the peaks of the rows, or None
    slots,
    num_live,
    B: tl.constexpr,
    LINES: tl.constexpr,  # rows per program; divides B
    KB: tl.constexpr,  # blocks per program
    OVERLAPS: tl.constexpr = False,
):
    """The largest size in every column, relative to those of the rows if these are given.

    Maxima are the same in any order.
    """
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    r = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * LINES + tl.arange(0, LINES)
    n = tl.program_id(2) * (KB * B) + tl.arange(0, KB * B)
    live = n < num_live * B
    source = values_ptr + r * slots * (B * B) + i[:, None] * B + (n // B * (B * B) + n % B)[None, :]
    w = tl.load(source, live[None, :], other=0.0)
    if rows_ptr is not None:
        w *= lift_of(tl.load(rows_ptr + r * B + i))[:, None]
    largest = tl.max(sizes(w), axis=0)
    c = tl.load(cols_ptr + r * slots + n // B, live, other=0)
    tl.atomic_max(peaks_ptr + c * B + n % B, largest.to(tl.int32, bitcast=True), live)


@triton.jit
def split_blocks(
    values_ptr,  # float32 [R, slots, B, B]
    high_ptr,  # float16 [R*B, width]; zeros if scattered
    low_ptr,  # as high
    factors_ptr,  # float32 [R*B], of columns [C*B]
    lifts_ptr,  # float32 [1 + C*B], of rows [1 + R*B]: whether x is multiplied, and by what
    peaks_ptr,  # float32, of what is scaled: [R*B] or [C*B]
    others_ptr,  # float32, of the others, relative to these: [C*B] or [R*B]
    cols_ptr,  # [R, slots]
    slots,
    num_live,
    width,
    length,  # of peaks
    others,  # of others
    B: tl.constexpr,
    LINES: tl.constexpr,  # rows per program; divides B
    KB: tl.constexpr,  # blocks per program
    BY_ROW: tl.constexpr,
    SCATTERED: tl.constexpr,
    OVERLAPS: tl.constexpr = False,
):
    """The live blocks of every row side by side, zeros up to the width; or in their places."""
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    r = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * LINES + tl.arange(0, LINES)
    n = tl.program_id(2) * (KB * B) + tl.arange(0, KB * B)
    live = n < num_live * B
    lift = lifted(others_ptr, others, 1024)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0) & (tl.program_id(2) == 0):
        tl.store(lifts_ptr, lift.to(tl.float32))
        for start in range(0, others, 1024):
            m = start + tl.arange(0, 1024)
            inverse = scales(tl.load(others_ptr + m, m < others, other=0.0))[1]
            tl.store(lifts_ptr + 1 + m, inverse * 16384, m < others)
        for start in range(0, length, 1024):
            m = start + tl.arange(0, 1024)
            inverse = scales(tl.load(peaks_ptr + m, m < length, other=0.0))[1]
            tl.store(factors_ptr + m, inverse * 16384, m < length)
    row = r * B + i
    source = values_ptr + r * slots * (B * B) + i[:, None] * B + (n // B * (B * B) + n % B)[None, :]
    w = tl.load(source, live[None, :], other=0.0)
    column = tl.load(cols_ptr + r * slots + n // B, live, other=0) * B + n % B
    if BY_ROW:
        if lift:
            w *= lift_of(tl.load(others_ptr + column, live, other=1.0))[None, :]
        w *= scales(tl.load(peaks_ptr + row))[0][:, None]
    else:
        if lift:
            w *= lift_of(tl.load(others_ptr + row))[:, None]
        w *= scales(tl.load(peaks_ptr + column, live, other=1.0))[0][None, :]
    high, low = halves(w)
    target = row[:, None] * width + (column if SCATTERED else n)[None, :]
    inside = live if SCATTERED else n < width
    tl.store(high_ptr + target, high, inside[None, :])
    tl.store(low_ptr + target, low, inside[None, :])
