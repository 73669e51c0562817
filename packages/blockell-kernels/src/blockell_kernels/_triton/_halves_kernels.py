# mypy: ignore-errors
"""Triton kernels that write a float32 weight as two float16 halves.

Legend: R block rows, C block columns, K live blocks per row, B tile side.

w = factor * (high + low): the factor is a power of two, so it is exact, and brings the largest
weight of a row (or column) to between 2**14 and 2**15, where neither float16 overflows nor the low
half of any weight above 2**-18 of the largest one underflows. 22 bits of every such weight are
kept, and of smaller ones all bits above 2**-40 of the largest. What is not finite goes into the low
half: in the high one it would meet low halves of both signs, and infinity would become NaN.

What a sum loses in a small weight could matter if it is multiplied with a large x. So where the
columns of a weight split by row (or the rows of one split by column) differ much, w is divided by
powers of two by column, too, and x will be multiplied by them: `lifted`.

The method is that of Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores
while surpassing the FP32 theoretical peak performance", 2022, but scaled by row.
"""

import triton
import triton.language as tl

MUCH = tl.constexpr(12)


@triton.jit
def scales(largest):
    """(scale, 1/scale): powers of two, |w| <= largest times scale is below 2**15.

    Denormal numbers are scaled by 2**126, which brings them into float16's range; infinity as if it
    were the largest finite number.
    """
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.minimum(tl.maximum(exponent, 15), 254)
    scale = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    inverse = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
    return scale, inverse


@triton.jit
def halves(w):
    """(high, low) of scaled w, in float16."""
    high = tl.where(tl.abs(w) < float("inf"), w.to(tl.float16), 0.0)
    return high, (w - high.to(tl.float32)).to(tl.float16)


@triton.jit
def row_peaks(
    values_ptr,  # float32 [R, slots, B, B]
    peaks_ptr,  # float32 [R*B]
    slots,
    num_live,
    B: tl.constexpr,
    LINES: tl.constexpr,  # rows per program; divides B
    KB: tl.constexpr,  # blocks per step
):
    """The largest size of a weight in every row."""
    r = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * LINES + tl.arange(0, LINES)
    n = tl.arange(0, KB * B)
    source = values_ptr + r * slots * (B * B) + i[:, None] * B + (n // B * (B * B) + n % B)[None, :]
    largest = tl.zeros((LINES,), tl.float32)
    for k in range(0, num_live, KB):
        w = tl.load(source + k * (B * B), (k + n // B < num_live)[None, :], other=0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(w), axis=1))
    tl.store(peaks_ptr + r * B + i, largest)


@triton.jit
def lift_of(peak):
    """The power of two that brings a peak to between 1 and 2."""
    return scales(peak)[0] * 0.00006103515625


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
def column_peaks(
    values_ptr,  # float32 [R, slots, B, B]
    peaks_ptr,  # int32 [C*B]: the bits of floats, zeros before
    cols_ptr,  # [R, slots]
    rows_ptr,  # float32 [R*B]: the peaks of the rows, or None
    slots,
    num_live,
    rows,  # R*B
    B: tl.constexpr,
    KB: tl.constexpr,  # blocks per program
):
    """The largest size of a weight in every column, of weights lifted by row if these are given.

    Maxima are the same in any order.
    """
    r = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * KB + tl.arange(0, KB * B) // B
    j = tl.arange(0, KB * B) % B
    live = k < num_live
    source = values_ptr + (r * slots + k) * (B * B) + j
    lift = False
    if rows_ptr is not None:
        lift = lifted(rows_ptr, rows, 1024)
    largest = tl.zeros((KB * B,), tl.float32)
    for start in range(0, B, 8):
        i = start + tl.arange(0, 8)
        w = tl.load(source[None, :] + i[:, None] * B, live[None, :], other=0.0)
        if rows_ptr is not None:  # noqa: SIM102 (one is decided when compiled)
            if lift:
                w *= lift_of(tl.load(rows_ptr + r * B + i))[:, None]
        largest = tl.maximum(largest, tl.max(tl.abs(w), axis=0))
    c = tl.load(cols_ptr + r * slots + k, live, other=0)
    tl.atomic_max(peaks_ptr + c * B + j, largest.to(tl.int32, bitcast=True), live)


@triton.jit
def store_lifts(lifts_ptr, peaks_ptr, lift, length, BLOCK: tl.constexpr):
    """The flag, and the factors of x."""
    tl.store(lifts_ptr, lift.to(tl.float32))
    for start in range(0, length, BLOCK):
        n = start + tl.arange(0, BLOCK)
        inverse = scales(tl.load(peaks_ptr + n, n < length, other=1.0))[1]
        tl.store(lifts_ptr + 1 + n, inverse * 16384, n < length)


@triton.jit
def split_rows(
    values_ptr,  # float32 [R, slots, B, B]
    high_ptr,  # float16 [R*B, width]; zeros if scattered
    low_ptr,  # as high
    factors_ptr,  # float32 [R*B]
    lifts_ptr,  # float32 [1 + C*B]: whether columns are lifted, and by which factors x is
    peaks_ptr,  # float32 [C*B], of the columns
    cols_ptr,  # [R, slots]
    slots,
    num_live,
    width,  # at least num_live*B
    columns,  # C*B
    B: tl.constexpr,
    LINES: tl.constexpr,  # rows per program; divides B
    KB: tl.constexpr,  # blocks per step
    SCATTERED: tl.constexpr,
):
    """The live blocks of every row, scaled by row: side by side, zeros up to the width, or each
    in its place in the dense weight."""
    r = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * LINES + tl.arange(0, LINES)
    n = tl.arange(0, KB * B)
    source = values_ptr + r * slots * (B * B) + i[:, None] * B + (n // B * (B * B) + n % B)[None, :]
    lift = lifted(peaks_ptr, columns, 1024)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        store_lifts(lifts_ptr, peaks_ptr, lift, columns, 1024)
    largest = tl.zeros((LINES,), tl.float32)
    for k in range(0, num_live, KB):
        live = k + n // B < num_live
        w = tl.load(source + k * (B * B), live[None, :], other=0.0)
        if lift:
            c = tl.load(cols_ptr + r * slots + k + n // B, live, other=0)
            w *= lift_of(tl.load(peaks_ptr + c * B + n % B, live, other=1.0))[None, :]
        largest = tl.maximum(largest, tl.max(tl.abs(w), axis=1))
    scale, inverse = scales(largest)
    tl.store(factors_ptr + r * B + i, inverse * 16384)
    line = (r * B + i)[:, None] * width
    for k in range(0, num_live if SCATTERED else tl.cdiv(width, B), KB):
        live = k + n // B < num_live
        w = tl.load(source + k * (B * B), live[None, :], other=0.0)
        c = tl.load(cols_ptr + r * slots + k + n // B, live, other=0)
        if lift:
            w *= lift_of(tl.load(peaks_ptr + c * B + n % B, live, other=1.0))[None, :]
        high, low = halves(w * scale[:, None])
        if SCATTERED:
            target, inside = line + (c * B + n % B)[None, :], live[None, :]
        else:
            target, inside = line + (k * B + n)[None, :], (k * B + n < width)[None, :]
        tl.store(high_ptr + target, high, inside)
        tl.store(low_ptr + target, low, inside)


@triton.jit
def split_columns(
    values_ptr,  # float32 [R, slots, B, B]
    high_ptr,  # float16 [R*B, width]; zeros if scattered
    low_ptr,  # as high
    factors_ptr,  # float32 [C*B]
    lifts_ptr,  # float32 [1 + R*B]: whether rows are lifted, and by which factors dy is
    rows_ptr,  # float32 [R*B]: the peaks of the rows
    columns_ptr,  # float32 [C*B]: those of the columns, of lifted weights
    cols_ptr,  # [R, slots]
    slots,
    num_live,
    width,
    rows,  # R*B
    columns,  # C*B
    B: tl.constexpr,
    LINES: tl.constexpr,  # rows per program; divides B
    KB: tl.constexpr,  # blocks per program
    SCATTERED: tl.constexpr,
):
    """The live blocks as of `split_rows`, scaled by column of the whole weight."""
    r = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * LINES + tl.arange(0, LINES)
    n = tl.program_id(2) * (KB * B) + tl.arange(0, KB * B)
    live = n < num_live * B
    source = values_ptr + r * slots * (B * B) + i[:, None] * B + (n // B * (B * B) + n % B)[None, :]
    lift = lifted(rows_ptr, rows, 1024)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0) & (tl.program_id(2) == 0):
        store_lifts(lifts_ptr, rows_ptr, lift, rows, 1024)
        for start in range(0, columns, 1024):
            c = start + tl.arange(0, 1024)
            inverse = scales(tl.load(columns_ptr + c, c < columns, other=0.0))[1]
            tl.store(factors_ptr + c, inverse * 16384, c < columns)
    w = tl.load(source, live[None, :], other=0.0)
    if lift:
        w *= lift_of(tl.load(rows_ptr + r * B + i))[:, None]
    c = tl.load(cols_ptr + r * slots + n // B, live, other=0) * B + n % B
    scale = scales(tl.load(columns_ptr + c, live, other=0.0))[0]
    high, low = halves(w * scale[None, :])
    target = (r * B + i)[:, None] * width + (c if SCATTERED else n)[None, :]
    tl.store(high_ptr + target, high, live[None, :])
    tl.store(low_ptr + target, low, live[None, :])


@triton.jit(do_not_specialize=["N"])
def token_peaks(
    t_ptr,  # float32 [N, width]
    peaks_ptr,  # float32 [N]
    extremes_ptr,  # int32 [2], zeros before
    N,
    width,
    stride,
    BT: tl.constexpr,
    BW: tl.constexpr,
):
    """The largest size in every token; the largest exponent of these, and 255 less the smallest.

    Tokens of zeros aside. Maxima are the same in any order.
    """
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)
    inside = tokens < N
    rows = t_ptr + tokens.to(tl.int64)[:, None] * stride
    largest = tl.zeros((BT,), tl.float32)
    for start in range(0, width, BW):
        n = start + tl.arange(0, BW)
        t = tl.load(rows + n[None, :], inside[:, None] & (n < width)[None, :], other=0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(t), axis=1))
    tl.store(peaks_ptr + tokens, largest, inside)
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    tl.atomic_max(extremes_ptr, tl.max(exponent, axis=0))
    tl.atomic_max(extremes_ptr + 1, tl.max(tl.where(largest > 0, 255 - exponent, 0), axis=0))
