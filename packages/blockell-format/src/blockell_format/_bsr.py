"""Interchange with torch's and scipy's BSR (block compressed sparse row) matrices.

Legend: R block rows, C block columns, K blocks (slots) per row, B tile side.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ._dense import pad_slots
from ._ell import BlockELLFormat


def _sorted_blocks(matrix: BlockELLFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Row starts [R+1], columns [R*live] and blocks [R*live, B, B], sorted by column in each row.

    The sort is a derived permutation: the slots of `matrix` stay where they are.
    """
    live, R, B = matrix.num_live, matrix.R, matrix.B
    columns, order = matrix.col_indices[:, :live].long().sort(dim=1)
    rows = torch.arange(R, device=columns.device)[:, None]
    blocks = matrix.values[:, :live][rows, order].reshape(R * live, B, B)
    starts = torch.arange(R + 1, device=columns.device) * live
    return starts, columns.reshape(-1), blocks


def _from_compressed(
    starts: Tensor,
    columns: Tensor,
    blocks: Tensor,
    shape: tuple[int, int],
    row_group: int,
    num_slots: int | None,
) -> BlockELLFormat:
    if blocks.dim() != 3 or blocks.shape[1] != blocks.shape[2]:
        raise ValueError(
            f"the matrix has blocks of shape {tuple(blocks.shape[1:])}; "
            "Block-ELL needs square ones."
        )
    counts = (starts[1:] - starts[:-1]).tolist()
    for row, count in enumerate(counts):
        if count != counts[0] or count == 0:
            raise ValueError(
                f"row {row} has {count} blocks and row 0 has {counts[0]}; Block-ELL needs equally "
                "many in every row, at least one: use from_dense(matrix.to_dense(), ...)."
            )
    B = blocks.shape[1]
    R, K = len(counts), counts[0]
    values = blocks.reshape(R, K, B, B)
    col_indices = columns.reshape(R, K).to(torch.int32)
    values, col_indices = pad_slots(values, col_indices, num_slots)
    matrix = BlockELLFormat(values.contiguous(), col_indices, shape[1] // B, row_group)
    matrix.validate()
    return matrix


def to_bsr(matrix: BlockELLFormat) -> Tensor:
    """A `torch.sparse_bsr` tensor [R*B, C*B] with the live blocks, sorted by column in each row.

    Any dtype and device that torch's BSR layout takes; indices are int64.
    """
    starts, columns, blocks = _sorted_blocks(matrix)
    with warnings.catch_warnings():
        # torch says once per process that the layout is in beta (who calls this asked for it), and
        # 2.11 that nothing is checked (here everything is)
        warnings.filterwarnings("ignore", message="Sparse BSR tensor support is in beta")
        warnings.filterwarnings("ignore", message="Sparse invariant checks are implicitly disabled")
        return torch.sparse_bsr_tensor(
            starts, columns, blocks, size=matrix.shape, check_invariants=True
        )


def from_bsr(bsr: Tensor, row_group: int = 1, *, num_slots: int | None = None) -> BlockELLFormat:
    """The inverse of `to_bsr`; slots come in the order of the BSR tensor.

    Args:
        bsr: `torch.sparse_bsr` tensor with square blocks, equally many in every block row.
        row_group: rows that share their columns, a divisor of R.
        num_slots: slots per row; those beyond the live blocks are spare. Default: none.

    Raises:
        ValueError: another layout, blocks not square, rows of different length.
    """
    if bsr.layout != torch.sparse_bsr or bsr.dim() != 2:
        raise ValueError(
            f"bsr has layout {bsr.layout} and {bsr.dim()} dimensions; it must be a "
            "torch.sparse_bsr matrix: dense.to_sparse_bsr((B, B))."
        )
    return _from_compressed(
        bsr.crow_indices(),
        bsr.col_indices(),
        bsr.values(),
        (bsr.shape[0], bsr.shape[1]),
        row_group,
        num_slots,
    )


def _scipy_sparse() -> Any:
    try:
        import scipy.sparse
    except ModuleNotFoundError as error:
        raise ImportError(
            "to_scipy and from_scipy need scipy, which is not installed; "
            'install it with: pip install "blockell-format[scipy]"'
        ) from error
    return scipy.sparse


def to_scipy(matrix: BlockELLFormat) -> Any:
    """A `scipy.sparse.bsr_array` [R*B, C*B] on the CPU, sorted by column in each row.

    Raises:
        ValueError: a dtype other than float32 and float64, which scipy does not hold.
        ImportError: scipy is not installed.
    """
    if matrix.values.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"values has dtype {matrix.values.dtype}; scipy holds float32 and float64 only: "
            "convert values with .float() first."
        )
    starts, columns, blocks = (t.detach().cpu().numpy() for t in _sorted_blocks(matrix))
    return _scipy_sparse().bsr_array(
        (blocks, columns, starts), shape=matrix.shape, blocksize=(matrix.B, matrix.B)
    )


def from_scipy(array: Any, row_group: int = 1, *, num_slots: int | None = None) -> BlockELLFormat:
    """The inverse of `to_scipy`; copies, slots come in the order of the scipy array.

    Args:
        array: `scipy.sparse.bsr_array` or `bsr_matrix` of float32 or float64, square blocks,
            equally many in every block row.
        row_group: rows that share their columns, a divisor of R.
        num_slots: slots per row; those beyond the live blocks are spare. Default: none.

    Raises:
        ValueError: another format or dtype, blocks not square, rows of different length.
        ImportError: scipy is not installed.
    """
    sparse = _scipy_sparse()
    if not (sparse.issparse(array) and array.format == "bsr"):
        raise ValueError(
            f"array is a {type(array).__name__}; it must be a scipy BSR array: "
            "array.tobsr(blocksize=(B, B))."
        )
    if array.dtype not in ("float32", "float64"):
        raise ValueError(f"array has dtype {array.dtype}; it must be float32 or float64.")
    return _from_compressed(
        torch.from_numpy(array.indptr.astype("int64")),
        torch.from_numpy(array.indices.astype("int64")),
        torch.from_numpy(array.data.copy()),
        array.shape,
        row_group,
        num_slots,
    )
