"""Covariance of a layer's inputs: whole, or its leading eigenvectors.

Legend: n inputs of the layer, r stored eigenvectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Covariance:
    """K = E[x x^T] [n, n]: the whole matrix, or V diag(s) V^T + rest * (I - V V^T).

    `rest` is the mean of the eigenvalues left out, so the trace is kept, and directions that are
    not stored are protected as much as they deserve on average (probabilistic PCA, Tipping &
    Bishop 1999, section 3.2).
    """

    matrix: Tensor | None = None
    """[n, n], symmetric; None for the low-rank form."""
    vectors: Tensor | None = None
    """V [n, r], orthonormal columns."""
    values: Tensor | None = None
    """s [r], eigenvalues, largest first."""
    rest: Tensor | None = None
    """0-d: mean of the other n - r eigenvalues."""

    @property
    def n(self) -> int:
        """Inputs of the layer."""
        source = self.matrix if self.matrix is not None else self.vectors
        assert source is not None
        return source.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by field name."""
        fields = {"matrix": self.matrix, "vectors": self.vectors, "values": self.values}
        return {k: v for k, v in {**fields, "rest": self.rest}.items() if v is not None}

    def dense(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """K as a matrix [n, n]."""
        if self.matrix is not None:
            return self.matrix.to(dtype)
        assert self.vectors is not None
        assert self.values is not None
        assert self.rest is not None
        V, rest = self.vectors.to(dtype), self.rest.to(dtype)
        K = (V * (self.values.to(dtype) - rest)) @ V.T
        K.diagonal().add_(rest)
        return K

    def restricted(self, columns: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """K[columns, columns]: int64 [..., k] -> [..., k, k]."""
        return self.dense(dtype)[columns[..., :, None], columns[..., None, :]]

    def diagonal(self) -> Tensor:
        """Mean energy of every input, float64 [n]."""
        return self.dense().diagonal().clone()

    def plus(self, other: Covariance) -> Covariance:
        """The sum, in the form of `self`: low rank stays at the same rank."""
        total = self.dense() + other.dense()
        if self.matrix is not None:
            return Covariance(total.to(self.matrix.dtype))
        assert self.values is not None
        return Covariance(total.to(self.values.dtype)).low_rank(self.values.numel())

    def low_rank(self, rank: int) -> Covariance:
        """The form that keeps `rank` eigenvectors; the whole matrix if that is no smaller."""
        if rank + 1 >= self.n:
            return self
        dtype = next(iter(self.tensors().values())).dtype
        values, vectors = torch.linalg.eigh(self.dense())
        kept = values[-rank:].flip(0).to(dtype) if rank else values[:0].to(dtype)
        basis = vectors[:, -rank:].flip(1) if rank else vectors[:, :0]
        rest = values[: self.n - rank].clamp(min=0).mean().to(dtype)
        return Covariance(vectors=basis.to(dtype).contiguous(), values=kept, rest=rest)

    def to(self, device: torch.device | str) -> Covariance:
        """The same on another device."""
        return Covariance(**{k: v.to(device) for k, v in self.tensors().items()})
