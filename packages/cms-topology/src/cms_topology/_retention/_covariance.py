"""Covariance of a layer's inputs: whole, or its leading eigenvectors.

Legend: n inputs of the layer, r stored eigenvectors; G groups of outputs that read
inputs of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Covariance:
    """K = E[x x^T] [n, n]: the whole matrix, or V diag(s) V^T + rest * (I - V V^T).

    Of a layer with groups, one per group: [G, n, n].

    `rest` is the mean of the eigenvalues left out, so the trace is kept, and directions that are
    not stored are protected as much as they deserve on average (probabilistic PCA, Tipping &
    Bishop 1999, section 3.2).
    """

    matrix: Tensor | None = None
    """[n, n] or [G, n, n], symmetric; None for the low-rank form."""
    vectors: Tensor | None = None
    """V [n, r] or [G, n, r], orthonormal columns."""
    values: Tensor | None = None
    """s [r] or [G, r], eigenvalues, largest first."""
    rest: Tensor | None = None
    """0-d or [G]: mean of the other n - r eigenvalues."""

    @property
    def n(self) -> int:
        """Inputs of the layer, or of each of its groups."""
        return self._source.shape[-2]

    @property
    def groups(self) -> int:
        """G."""
        return self._source.shape[0] if self._source.ndim == 3 else 1

    @property
    def _source(self) -> Tensor:
        source = self.matrix if self.matrix is not None else self.vectors
        assert source is not None
        return source

    @property
    def num_bytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by field name."""
        fields = {"matrix": self.matrix, "vectors": self.vectors, "values": self.values}
        return {k: v for k, v in {**fields, "rest": self.rest}.items() if v is not None}

    def dense(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """K as a matrix [n, n] or [G, n, n]."""
        if self.matrix is not None:
            return self.matrix.to(dtype)
        assert self.vectors is not None
        assert self.values is not None
        assert self.rest is not None
        V, rest = self.vectors.to(dtype), self.rest.to(dtype)
        K = (V * (self.values.to(dtype) - rest[..., None])[..., None, :]) @ V.mT
        K.diagonal(dim1=-2, dim2=-1).add_(rest[..., None])
        return K

    def restricted(self, columns: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """K[columns, columns]: int64 [..., k] -> [..., k, k]; of groups always all columns."""
        if self.groups > 1:
            return self.dense(dtype)
        return self.dense(dtype)[columns[..., :, None], columns[..., None, :]]

    def diagonal(self) -> Tensor:
        """Mean energy of every input, float64 [n] or [G, n]."""
        return self.dense().diagonal(dim1=-2, dim2=-1).clone()

    def plus(self, other: Covariance) -> Covariance:
        """The sum, in the form of `self`: low rank stays at the same rank."""
        mine, theirs = self.dense(), other.dense()
        if self.groups != other.groups:
            groups = math.lcm(self.groups, other.groups)
            mine, theirs = in_groups(mine, groups), in_groups(theirs, groups)
        total = mine + theirs
        if self.matrix is not None:
            return Covariance(total.to(self.matrix.dtype))
        assert self.values is not None
        return Covariance(total.to(self.values.dtype)).low_rank(self.values.shape[-1])

    def low_rank(self, rank: int) -> Covariance:
        """The form that keeps `rank` eigenvectors; the whole matrix if that is no smaller."""
        if rank + 1 >= self.n:
            return self
        dtype = next(iter(self.tensors().values())).dtype
        values, vectors = torch.linalg.eigh(self.dense())
        first = self.n - rank
        kept = values[..., first:].flip(-1).to(dtype)
        basis = vectors[..., first:].flip(-1)
        rest = values[..., :first].clamp(min=0).mean(-1).to(dtype)
        return Covariance(vectors=basis.to(dtype).contiguous(), values=kept, rest=rest)

    def to(self, device: torch.device | str) -> Covariance:
        """The same on another device."""
        return Covariance(**{k: v.to(device) for k, v in self.tensors().items()})


def in_groups(stacked: Tensor, groups: int) -> Tensor:
    """What all groups share, or larger groups, for each of `groups`: [n, n] or [G, ...] -> [groups,
    ...]."""
    if stacked.ndim == 2:
        stacked = stacked[None]
    return stacked.repeat_interleave(groups // stacked.shape[0], 0)
