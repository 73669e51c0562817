"""Dense matrices and block lists.

Legend: R block rows, C block columns, K blocks (slots) per row, B tile side, G rows of a group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._ell import BlockELLFormat
from ._topology import expand_row_group
from ._validation import num_blocks_for_density, validate_row_group


def to_dense(values: Tensor, col_indices: Tensor, R: int, C: int, K: int, B: int) -> Tensor:
    """The dense matrix; differentiable in `values`.

    Args:
        values: [R, K, B, B].
        col_indices: int [R, K], a valid topology; -1 in spare slots, whose values are ignored. On
            a CPU a column out of range raises IndexError.
        R, C, K, B: block rows, block columns, slots per row, tile side.

    Returns:
        [R*B, C*B], dtype and device of `values`.

    Raises:
        ValueError: shapes that do not fit R, K, B.
    """
    if values.shape != (R, K, B, B):
        raise ValueError(
            f"values has shape {tuple(values.shape)}; it must be [R, K, B, B] = {(R, K, B, B)}."
        )
    if col_indices.shape != (R, K):
        raise ValueError(
            f"col_indices has shape {tuple(col_indices.shape)}; it must be [R, K] = {(R, K)}."
        )
    rows = torch.arange(R, device=values.device)[:, None].expand(R, K)
    # spare slots are written to one column more, which is cut off: no data-dependent shape; live
    # ones that are out of range must not get there, and raise where they are used
    columns = torch.where(col_indices < 0, C, col_indices + (col_indices >= C)).long()
    blocks = values.new_zeros(R, C + 1, B, B).index_put((rows, columns), values)
    return blocks[:, :C].transpose(1, 2).reshape(R * B, C * B)


def pad_slots(values: Tensor, col_indices: Tensor, num_slots: int | None) -> tuple[Tensor, Tensor]:
    """Append spare slots up to `num_slots` per row (None: leave as is)."""
    R, K, B, _ = values.shape
    if num_slots is None or num_slots == K:
        return values, col_indices
    if num_slots < K:
        raise ValueError(f"num_slots (={num_slots}) must be at least {K}, the live blocks per row.")
    more = num_slots - K
    return (
        torch.cat([values, values.new_zeros(R, more, B, B)], dim=1),
        torch.cat([col_indices, col_indices.new_full((R, more), -1)], dim=1),
    )


def from_dense(
    dense: Tensor,
    tile_size: int,
    density: float,
    row_group: int = 1,
    *,
    num_slots: int | None = None,
) -> BlockELLFormat:
    """Keep the blocks of largest Frobenius norm in every row (group); differentiable.

    A group's norm is the root of the sum of squares over its rows. Of equal norms the lower
    column wins, so the result is the same on every machine. Columns ascend within a row.

    Args:
        dense: floating point [out_features, in_features], both multiples of `tile_size`.
        tile_size: B.
        density: asked share of blocks to keep, in (0, 1]; K = max(1, round(density * C)).
        row_group: rows that share their columns, a divisor of R.
        num_slots: slots per row; those beyond K are spare. Default: K.

    Raises:
        ValueError: wrong shape or dtype, sizes not divisible, density out of range.
    """
    if dense.dim() != 2 or not dense.is_floating_point():
        raise ValueError(
            f"dense has shape {tuple(dense.shape)} and dtype {dense.dtype}; "
            "it must be a floating point matrix."
        )
    B = tile_size
    if B < 1:
        raise ValueError(f"tile_size (={B}) must be at least 1.")
    for name, size in zip(("out_features", "in_features"), dense.shape, strict=True):
        if size < 1 or size % B:
            low = size - size % B
            nearest = f"{low} or {low + B}" if low else f"{B}"
            raise ValueError(
                f"{name} (={size}) must be a multiple of tile_size (={B}); nearest: {nearest}."
            )
    R, C = dense.shape[0] // B, dense.shape[1] // B
    validate_row_group(R, row_group)
    K = num_blocks_for_density(C, density)
    blocks = dense.reshape(R, B, C, B).transpose(1, 2)
    exact = torch.float32 if dense.device.type == "mps" else torch.float64
    groups = blocks.detach().reshape(R // row_group, row_group, C, B, B)
    norms = torch.linalg.vector_norm(groups, dim=(1, 3, 4), dtype=exact)
    kept = norms.argsort(dim=1, descending=True, stable=True)[:, :K].sort(dim=1).values
    columns = expand_row_group(kept, row_group)
    values = blocks[torch.arange(R, device=dense.device)[:, None], columns]
    values, col_indices = pad_slots(values, columns.to(torch.int32), num_slots)
    return BlockELLFormat(values.contiguous(), col_indices, C, row_group)


def to_block_list(matrix: BlockELLFormat) -> list[tuple[int, int, Tensor]]:
    """All live blocks as (row, column, block [B, B]), by row, then slot. Blocks are views."""
    columns = matrix.col_indices.detach().cpu().tolist()
    return [
        (row, column, matrix.values[row, slot])
        for row, entries in enumerate(columns)
        for slot, column in enumerate(entries)
        if column >= 0
    ]


def from_block_list(
    blocks: Sequence[tuple[int, int, Tensor]],
    R: int,
    C: int,
    row_group: int = 1,
    *,
    num_slots: int | None = None,
) -> BlockELLFormat:
    """Put blocks into slots in the order of the list; the inverse of `to_block_list`.

    Args:
        blocks: (row, column, block [B, B]); rows in any order, each with equally many blocks.
        R, C: block rows and block columns.
        row_group: rows that share their columns, a divisor of R.
        num_slots: slots per row; those beyond the live blocks are spare. Default: none.

    Raises:
        ValueError: no blocks, a row outside [0, R), rows of different length, blocks of different
            shape, or an invalid topology.
    """
    if not blocks:
        raise ValueError("blocks is empty; every row needs at least one block.")
    by_row: list[list[tuple[int, Tensor]]] = [[] for _ in range(R)]
    B = blocks[0][2].shape[-1]
    for row, column, block in blocks:
        if not 0 <= row < R:
            raise ValueError(
                f"row (={row}) of block (row {row}, column {column}) must be in [0, {R})."
            )
        if block.shape != (B, B):
            raise ValueError(
                f"block (row {row}, column {column}) has shape {tuple(block.shape)}; "
                f"all blocks must be {(B, B)}."
            )
        by_row[row].append((column, block))
    K = len(by_row[0])
    for row, entries in enumerate(by_row):
        if len(entries) != K or not entries:
            raise ValueError(
                f"row {row} has {len(entries)} blocks and row 0 has {K}; every row must have the "
                "same number, at least one."
            )
    values = torch.stack([torch.stack([block for _, block in entries]) for entries in by_row])
    columns = [[column for column, _ in entries] for entries in by_row]
    col_indices = torch.tensor(columns, dtype=torch.int32, device=values.device)
    matrix = BlockELLFormat(*pad_slots(values, col_indices, num_slots), C, row_group)
    matrix.validate()
    return matrix
