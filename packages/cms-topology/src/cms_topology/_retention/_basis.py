"""Leading directions of the inputs, and one number for all the others.

Legend: G units of a layer, n inputs of a unit, r leading directions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

TAIL = 1e-4
"""What replacing the eigenvalues of the tail by its largest may add, as a share of the trace."""
NOISE = 1e-7
"""Eigenvalues below this share of the largest are rounding of a covariance kept in float32."""


class Eigenbasis(NamedTuple):
    """K of every unit as U diag(s) U^T + rest (I - U U^T), an upper bound that is nearly tight.

    Inputs have far fewer directions than dimensions, as a rule. Time and memory of a projection go
    with r.
    """

    vectors: Tensor
    """U [G, n, r], in the weights' precision."""
    values: Tensor
    """s [G, r] float64, largest first, none below zero."""
    rest: Tensor
    """[G] float64: largest eigenvalue outside of U; 0 if there is no outside."""

    @property
    def rank(self) -> int:
        """r, the same for all units."""
        return self.values.shape[1]

    def cut(self, rank: int) -> Eigenbasis:
        """The first `rank` directions, of which the others are padding."""
        return Eigenbasis(self.vectors[..., :rank], self.values[..., :rank], self.rest)

    def padded(self, rank: int) -> Eigenbasis:
        """The same with zeros up to `rank` directions; they have no effect."""
        more = rank - self.rank
        return Eigenbasis(
            functional.pad(self.vectors, (0, more)),
            functional.pad(self.values, (0, more)),
            self.rest,
        )


def eigenbasis(K: Tensor, dtype: torch.dtype, rank: int | None = None) -> Eigenbasis:
    """Leading directions of covariances.

    Args:
        K: float64 [G, n, n].
        dtype: of the vectors.
        rank: how many; default: as few as leave a tail that is flat or negligible in every unit.
    """
    s, U = torch.linalg.eigh(K)
    s, U = s.flip(1), U.flip(2)
    s = torch.where(s > NOISE * s[:, :1], s, 0.0).clamp(min=0)
    n = s.shape[1]
    if rank is None:
        rank = _needed(s)
    rest = s[:, rank] if rank < n else s.new_zeros(s.shape[0])
    return Eigenbasis(U[:, :, :rank].to(dtype).contiguous(), s[:, :rank].contiguous(), rest)


def _needed(s: Tensor) -> int:
    """Smallest r for which (n - r) s_r, which bounds the tail, exceeds it by no more than TAIL."""
    n = s.shape[1]
    tail = s.flip(1).cumsum(1).flip(1)  # sum from r on
    count = torch.arange(n, 0, -1, device=s.device)
    excess = count * s - tail
    # the excess is zero in a flat tail, however heavy that is
    enough = (excess <= TAIL * tail[:, :1]).all(0)
    found = enough.nonzero()
    rank = int(found[0]) if found.numel() else n
    # a basis that is nearly complete may as well be
    return n if rank > 0.9 * n else rank
