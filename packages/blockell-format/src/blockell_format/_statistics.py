"""Statistics of a topology, in numpy.

Legend: R block rows, C block columns, K blocks (slots) per row; -1 marks a spare slot.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.integer]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Overlap:
    """How many (row, column) positions two topologies share. Made by `block_overlap`."""

    fraction: float
    """Positions in both over positions in either (Jaccard index), in [0, 1]."""
    chance: float
    """What two independent random topologies of these densities give: d/(2-d) at density d."""
    intersection: int
    """Positions in both."""
    union: int
    """Positions in either."""


def _columns(col_indices: npt.ArrayLike, C: int, what: str = "col_indices") -> IntArray:
    cols = np.asarray(col_indices)
    if C < 1:
        raise ValueError(f"C (={C}) must be at least 1.")
    if cols.dtype.kind not in "iu":
        raise ValueError(f"{what} has dtype {cols.dtype}; it must hold integers.")
    if cols.size and (cols.min() < -1 or cols.max() >= C):
        raise ValueError(
            f"{what} holds values from {cols.min()} to {cols.max()}; they must be in [0, {C}), "
            "or -1 in a spare slot."
        )
    return cols


def column_usage(col_indices: npt.ArrayLike, C: int) -> npt.NDArray[np.int64]:
    """Number of live blocks in each block column.

    Args:
        col_indices: integers of any shape, usually [R, K]; -1 is ignored.
        C: block columns.

    Returns:
        int64 [C].

    Raises:
        ValueError: a value outside [-1, C).
    """
    cols = _columns(col_indices, C).ravel()
    # one bin more catches the spare slots, so that no filtered copy is made
    return np.bincount(cols.astype(np.int64) + 1, minlength=C + 1)[1:].astype(np.int64)


def column_entropy(col_indices: npt.ArrayLike, C: int) -> float:
    """Shannon entropy of the column usage, divided by log C.

    1 means that every column holds the same number of blocks, 0 that one column holds all.

    Args:
        col_indices: integers of any shape, usually [R, K]; -1 is ignored.
        C: block columns.

    Returns:
        float in [0, 1]; 1.0 for C == 1; 0.0 when there is no live block.

    Raises:
        ValueError: a value outside [-1, C).
    """
    usage = column_usage(col_indices, C)
    total = int(usage.sum())
    if total == 0:
        return 0.0
    if C == 1:
        return 1.0
    share = usage[usage > 0] / total
    entropy = -float(np.sum(share * np.log(share))) / float(np.log(C))
    return min(1.0, max(0.0, entropy))


def block_mask(col_indices: npt.ArrayLike, C: int) -> BoolArray:
    """Which positions hold a block.

    Args:
        col_indices: integers [R, K]; -1 is ignored.
        C: block columns.

    Returns:
        bool [R, C].

    Raises:
        ValueError: wrong shape or a value outside [-1, C).
    """
    cols = _columns(col_indices, C)
    if cols.ndim != 2:
        raise ValueError(f"col_indices has shape {cols.shape}; it must be [R, K].")
    mask = np.zeros((cols.shape[0], C + 1), dtype=bool)
    np.put_along_axis(mask, np.where(cols < 0, C, cols).astype(np.int64), True, axis=1)
    return mask[:, :C]


def _as_mask(topology: npt.ArrayLike, C: int, what: str) -> BoolArray:
    array = np.asarray(topology)
    if array.dtype != np.bool_:
        return block_mask(array, C)
    if array.ndim != 2 or array.shape[1] != C:
        raise ValueError(f"{what} is a mask of shape {array.shape}; it must be [R, C={C}].")
    return array


def block_overlap(a: npt.ArrayLike, b: npt.ArrayLike, C: int) -> Overlap:
    """Share of (row, column) positions that two topologies have in common.

    The chance level is the ratio of the expected intersection and the expected union of two
    independent uniform topologies of densities p and q: pq / (p + q - pq), which is d / (2 - d)
    for equal densities.

    Args:
        a, b: integers [R, K_a] and [R, K_b] with -1 in spare slots, or bool masks [R, C] (for
            instance the blocks that a task changed).
        C: block columns.

    Returns:
        `Overlap`; two topologies without any block have fraction 0 and chance 0.

    Raises:
        ValueError: different R, wrong shape, or a value outside [-1, C).
    """
    mask_a, mask_b = _as_mask(a, C, "a"), _as_mask(b, C, "b")
    if mask_a.shape != mask_b.shape:
        raise ValueError(
            f"a has {mask_a.shape[0]} block rows and b has {mask_b.shape[0]}; "
            "only topologies of one layer shape can be compared."
        )
    intersection = int(np.count_nonzero(mask_a & mask_b))
    union = int(np.count_nonzero(mask_a | mask_b))
    if union == 0:
        return Overlap(0.0, 0.0, 0, 0)
    p, q = float(mask_a.mean()), float(mask_b.mean())
    return Overlap(intersection / union, p * q / (p + q - p * q), intersection, union)


def exploration_rate(col_indices_history: Iterable[npt.ArrayLike], C: int) -> float:
    """Share of all R*C positions that held a block at least once.

    Args:
        col_indices_history: integers [T, R, K], or any iterable of [R, K] arrays.
        C: block columns.

    Returns:
        float in [0, 1].

    Raises:
        ValueError: an empty history, different R, or a value outside [-1, C).
    """
    ever: BoolArray | None = None
    for col_indices in col_indices_history:
        mask = block_mask(col_indices, C)
        if ever is not None and mask.shape != ever.shape:
            raise ValueError(
                f"col_indices_history mixes layers of {ever.shape[0]} and {mask.shape[0]} "
                "block rows; pass the history of one layer."
            )
        ever = mask if ever is None else ever | mask
    if ever is None:
        raise ValueError("col_indices_history is empty; pass at least one topology.")
    return float(ever.mean())


def topology_checksum(col_indices: npt.ArrayLike, *extra_arrays: npt.ArrayLike) -> str:
    """Fingerprint of a topology, equal on every machine for equal content.

    blake2b (16 bytes) over dtype, shape and little-endian bytes of every array in order, so it
    changes with the order of slots, of arrays, and with the type.

    Args:
        col_indices: integers [R, K].
        extra_arrays: further arrays to cover, such as ages or new values. numpy has no bfloat16:
            pass such a tensor as `tensor.view(torch.int16)`.

    Returns:
        32 hexadecimal digits.

    Raises:
        ValueError: an array that is not made of booleans or numbers.
    """
    digest = hashlib.blake2b(digest_size=16)
    for array in map(np.asarray, (col_indices, *extra_arrays)):
        if array.dtype.kind not in "biufc":
            raise ValueError(f"cannot fingerprint dtype {array.dtype}; pass booleans or numbers.")
        little = array.dtype.newbyteorder("<")
        digest.update(f"{little.str}{array.shape};".encode())
        digest.update(np.ascontiguousarray(array, dtype=little).tobytes())
    return digest.hexdigest()
