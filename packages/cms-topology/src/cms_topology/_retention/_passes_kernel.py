# mypy: ignore-errors
"""Triton kernels for what a projection does beside its products: one pass over memory each.

Legend: U units of all layers, G units of a layer, m rows and n inputs of a unit, r leading
directions, B tile side of block-sparse layers with K slots per row; of a dense matrix B = 1 and
K = n.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from cms_topology._addresses import address_table

ROWS, COLUMNS = 32, 128
"""Of a unit, that a program holds at a time."""
TILES = 4
"""Such pieces below one another, whose squares a program adds up."""


class Weights(NamedTuple):
    """Where the float32 weights of the layers stand."""

    parameters: Sequence[Tensor]
    """Contiguous [G m, n], or [R, K, B, B]."""
    units: int
    """G."""
    slots: int
    """K."""
    tile: int
    """B."""
    still: Sequence[Tensor | None]
    """Bool [G m] of each layer: rows that stay as they are in the anchor; None: no row does."""

    @property
    def table(self) -> Tensor:
        """int64 [layers, 2], addresses of the parameter and of `still`, 0 for None."""
        rows = tuple(
            (parameter.data_ptr(), 0 if still is None else still.data_ptr())
            for parameter, still in zip(self.parameters, self.still, strict=True)
        )
        return address_table(rows, self.parameters[0].device)


@triton.jit
def _piece(m, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Unit, rows, columns of this program; whether they exist; and places in [U, m, n]."""
    across = tl.cdiv(n, COLUMNS)
    pieces = tl.cdiv(m, ROWS) * across
    unit, piece = tl.program_id(0) // pieces, tl.program_id(0) % pieces
    row = piece // across * ROWS + tl.arange(0, ROWS)[:, None]
    column = piece % across * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    at = (unit.to(tl.int64) * m + row) * n + column
    return unit, row, column, (row < m) & (column < n), at


@triton.jit
def _weights(table_ptr, unit, row, column, G, m, K, B: tl.constexpr):
    """Addresses of elements of a unit in the parameter of its layer."""
    address = tl.load(table_ptr + unit // G * 2)
    weights_ptr = tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 16)
    row = (unit % G) * m + row
    block = (row // B).to(tl.int64) * K + column // B
    return weights_ptr + (block * B + row % B) * B + column % B


@triton.jit
def _to_tf32(x):
    """The nearest float32 that TF32 holds."""
    return ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _cut(x_ptr, high_ptr, low_ptr, N, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, at < N, other=0.0)
    high = _to_tf32(x)
    tl.store(high_ptr + at, high, at < N)
    tl.store(low_ptr + at, x - high, at < N)


@triton.jit
def _open(
    table_ptr,  # int64 [layers, 2]
    anchor_ptr,  # [U, m, n]
    reference_ptr,  # [U, m, n]; replaced by the weights less what is taken outside
    both_ptr,  # [U, 2 m, n], written: displacement less what is taken outside, above the update
    low_ptr,  # [U, m, n], written if CUT: what TF32 would lose of the displacement, left out above
    outside_ptr,  # [U]: share of the update that is taken outside of the leading directions
    squares_ptr,  # [U, pieces], written: of that displacement
    G,
    m,
    n,
    half,  # m n
    K,
    B: tl.constexpr,
    OUTSIDE: tl.constexpr,
    STILL: tl.constexpr,
    CUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    unit, row, column, there, at = _piece(m, n, ROWS, COLUMNS)
    now = tl.load(_weights(table_ptr, unit, row, column, G, m, K, B), there, other=0.0)
    anchor = tl.load(anchor_ptr + at, there, other=0.0)
    before = tl.load(reference_ptr + at, there, other=0.0)
    if STILL:
        address = tl.load(table_ptr + unit // G * 2 + 1)
        still_ptr = address.to(tl.pointer_type(tl.int8)) + (unit % G) * m + row
        still = tl.load(still_ptr, (row < m) & (address != 0), other=0) != 0
        now, before = tl.where(still, anchor, now), tl.where(still, anchor, before)
    update, moved = now - before, now - anchor
    if OUTSIDE:
        taken = update * tl.load(outside_ptr + unit)
        now -= taken
        moved -= taken
        tl.store(squares_ptr + tl.program_id(0), tl.sum(tl.sum(moved * moved, 1), 0))
    tl.store(reference_ptr + at, now, there)
    above = at + unit.to(tl.int64) * m * n
    if CUT:
        high = _to_tf32(moved)
        tl.store(low_ptr + at, moved - high, there)
        moved = high
    tl.store(both_ptr + above, moved, there)
    tl.store(both_ptr + above + half, update, there)


@triton.jit
def _squares(
    coefficients_ptr,  # [U, 2 m, r]: of the displacement, above those of the update
    shift_ptr,  # [U, r]: share of the update's that is added to the displacement's
    kept_ptr,  # [U, chunks, r], written: sums of the squares of what that gives
    inside_ptr,  # [U, chunks, r], written: of the displacement's
    m,
    r,
    half,  # m r
    OUTSIDE: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    across = tl.cdiv(r, COLUMNS)
    chunk, unit = tl.program_id(0) // across, tl.program_id(1)
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    inner = column < r
    shift = tl.load(shift_ptr + unit * r + column, inner, other=0.0)[None, :]
    kept = tl.zeros((ROWS, COLUMNS), tl.float32)
    inside = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in tl.static_range(TILES):
        row = (chunk * TILES + tile) * ROWS + tl.arange(0, ROWS)[:, None]
        there = (row < m) & inner[None, :]
        at = (unit.to(tl.int64) * 2 * m + row) * r + column[None, :]
        C = tl.load(coefficients_ptr + at, there, other=0.0)
        left = C + shift * tl.load(coefficients_ptr + at + half, there, other=0.0)
        kept += left * left
        if OUTSIDE:
            inside += C * C
    at = (unit * (tl.num_programs(0) // across) + chunk) * r + column
    tl.store(kept_ptr + at, tl.sum(kept, 0), inner)
    if OUTSIDE:
        tl.store(inside_ptr + at, tl.sum(inside, 0), inner)


@triton.jit
def _take(
    coefficients_ptr,  # [U, 2 m, r]; the upper half is replaced by what shall be taken away
    shift_ptr,  # [U, r]
    factor_ptr,  # float64 [U, r + 1]: what is left along each direction and outside of all
    m,
    r,
    half,  # m r
    BUDGET: tl.constexpr,
    OUTSIDE: tl.constexpr,
    CUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    unit, row, column, there, _ = _piece(m, r, ROWS, COLUMNS)
    inner = column < r
    at = (unit.to(tl.int64) * 2 * m + row) * r + column
    along = tl.load(coefficients_ptr + at + half, there, other=0.0)
    taken = -along * tl.load(shift_ptr + unit * r + column, inner, other=0.0)
    if BUDGET:
        factor = tl.load(factor_ptr + unit * (r + 1) + column, inner, other=1.0)
        outside = tl.load(factor_ptr + unit * (r + 1) + r) if OUTSIDE else 1.0
        taken = taken * factor.to(tl.float32)
        more = (outside - factor).to(tl.float32)
        if tl.max(tl.max(tl.abs(more), 1), 0) > 0.0:  # within the budget it is not read
            taken += tl.load(coefficients_ptr + at, there, other=0.0) * more
    tl.store(coefficients_ptr + at, _to_tf32(taken) if CUT else taken, there)


@triton.jit
def _shrink_outside(
    both_ptr,  # [U, 2 m, n]: displacement above the update
    low_ptr,  # [U, m, n]: the rest of the displacement if CUT
    factor_ptr,  # float64 [U, r + 1]
    result_ptr,  # [U, m, n]: the displacement is multiplied by the last factor in it
    m,
    n,
    r,
    CUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    unit, _, _, there, at = _piece(m, n, ROWS, COLUMNS)
    taken = (1.0 - tl.load(factor_ptr + unit * (r + 1) + r)).to(tl.float32)
    if taken != 0.0:  # mostly it is
        moved = tl.load(both_ptr + at + unit.to(tl.int64) * m * n, there, other=0.0)
        if CUT:
            moved += tl.load(low_ptr + at, there, other=0.0)
        tl.store(result_ptr + at, tl.load(result_ptr + at, there) - moved * taken, there)


@triton.jit
def _close(
    table_ptr,  # int64 [layers, 2]; written
    result_ptr,  # [U, m, n]
    G,
    m,
    n,
    K,
    B: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    unit, row, column, there, at = _piece(m, n, ROWS, COLUMNS)
    values = tl.load(result_ptr + at, there)
    tl.store(_weights(table_ptr, unit, row, column, G, m, K, B), values, there)


def _pieces(m: int, n: int) -> int:
    return triton.cdiv(m, ROWS) * triton.cdiv(n, COLUMNS)


def cut(x: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest tensor that TF32 holds, and the rest: added, the contiguous `x` to the bit.

    a b is a_high b_high + a_high b_low + a_low b_high up to 2^-22, by three products in TF32.
    """
    high, low = torch.empty_like(x), torch.empty_like(x)
    _cut[(triton.cdiv(x.numel(), 2048),)](x, high, low, x.numel(), BLOCK=2048)
    return high, low


def begin(
    weights: Weights, anchor: Tensor, reference: Tensor, outside: Tensor | None, cut: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Displacement and update, what is taken outside of the directions left out of the former.

    Args:
        weights: of all layers.
        anchor: [U, m, n].
        reference: [U, m, n]; the weights, less what is taken outside, are written here.
        outside: [U], share of the update that is taken there; None: there is nothing outside.
        cut: whether what TF32 cannot hold of the displacement is kept apart.

    Returns:
        [U, 2 m, n], displacement above update; if `cut` the displacement's low bits, [U, m, n],
        which are missing there; and float64 [U], the displacement's squares.
    """
    U, m, n = anchor.shape
    both = anchor.new_empty(U, 2 * m, n)
    low = torch.empty_like(anchor) if cut else None
    squares = anchor.new_empty(U, _pieces(m, n)) if outside is not None else anchor
    _open[(U * _pieces(m, n),)](
        weights.table,
        anchor,
        reference,
        both,
        both if low is None else low,
        anchor if outside is None else outside,
        squares,
        weights.units,
        m,
        n,
        m * n,
        weights.slots,
        B=weights.tile,
        OUTSIDE=outside is not None,
        STILL=any(still is not None for still in weights.still),
        CUT=cut,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
    )
    return both, low, None if outside is None else squares.sum(1, dtype=torch.float64)


def squares(coefficients: Tensor, shift: Tensor, outside: bool) -> tuple[Tensor, Tensor | None]:
    """Squares along each direction of the displacement's coefficients + `shift` times the update's.

    Args:
        coefficients: [U, 2 m, r], the displacement's above the update's.
        shift: [U, r].
        outside: whether those of the displacement itself are wanted, too.

    Returns:
        float64 [U, r]; and float64 [U], the sum of the displacement's own.
    """
    U, m, r = len(coefficients), coefficients.shape[1] // 2, coefficients.shape[2]
    chunks = triton.cdiv(m, ROWS * TILES)
    kept = coefficients.new_empty(U, chunks, r)
    inside = torch.empty_like(kept) if outside else kept
    _squares[(chunks * triton.cdiv(r, COLUMNS), U)](
        coefficients,
        shift,
        kept,
        inside,
        m,
        r,
        m * r,
        OUTSIDE=outside,
        ROWS=ROWS,
        TILES=TILES,
        COLUMNS=COLUMNS,
    )
    return kept.sum(1, dtype=torch.float64), (
        inside.sum((1, 2), dtype=torch.float64) if outside else None
    )


def take(
    coefficients: Tensor, shift: Tensor, factor: Tensor | None, outside: bool, cut: bool
) -> Tensor:
    """Coefficients of what is taken from the weights, [U, m, r]; in place.

    Args:
        coefficients, shift: as in `squares`.
        factor: float64 [U, r + 1], what a budget leaves along each direction and outside of all.
        outside: whether there is anything there.
        cut: whether they are rounded to what TF32 holds.
    """
    U, m, r = len(coefficients), coefficients.shape[1] // 2, coefficients.shape[2]
    _take[(U * _pieces(m, r),)](
        coefficients,
        shift,
        coefficients if factor is None else factor,
        m,
        r,
        m * r,
        BUDGET=factor is not None,
        OUTSIDE=outside,
        CUT=cut,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
    )
    return coefficients[:, :m]


def shrink_outside(both: Tensor, low: Tensor | None, factor: Tensor, result: Tensor) -> None:
    """Multiply the displacement in `result` by the last factor, for what is outside of all.

    Args:
        both, low: as `begin` returned them.
        factor: as in `take`.
        result: [U, m, n], in place.
    """
    U, m, n = result.shape
    _shrink_outside[(U * _pieces(m, n),)](
        both,
        both if low is None else low,
        factor,
        result,
        m,
        n,
        factor.shape[1] - 1,
        CUT=low is not None,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
    )


def end(weights: Weights, result: Tensor) -> None:
    """Write [U, m, n] to the parameters."""
    U, m, n = result.shape
    _close[(U * _pieces(m, n),)](
        weights.table,
        result,
        weights.units,
        m,
        n,
        weights.slots,
        B=weights.tile,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
    )
    increment_version(weights.parameters)  # so that autograd notices, as after an operator of torch
