"""What the guard knows of one weight matrix, and how that survives a change of topology.

Legend: G units of a layer, m rows and n inputs of a unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cms_topology._retention._basis import Eigenbasis, eigenbasis
from cms_topology._retention._compensation import absorb
from cms_topology._retention._units import ProtectedWeight


@dataclass(frozen=True, eq=False)
class WeightState:
    """Anchor, directions and debts of one weight matrix."""

    columns: Tensor
    """Inputs that each unit reads, int64 [G, n]."""
    anchor: Tensor
    """Consolidated weights, [G, m, n]."""
    reference: Tensor
    """Weights after the last projection, [G, m, n]: updates count from here."""
    basis: Eigenbasis
    """Leading directions of each unit's inputs."""
    scale: Tensor
    """0-d float64: tr(W K W^T) of the anchor when it was set, the unit of relative drift."""
    debt: Tensor
    """0-d float64: energy of the output error that dropped blocks left behind."""
    multiplier: Tensor
    """0-d float64: Lagrange multiplier of the last projection, where the next search begins."""

    def tensors(self) -> dict[str, Tensor]:
        """What `restored` needs."""
        kept = {
            "columns": self.columns,
            "anchor": self.anchor,
            "reference": self.reference,
            "scale": self.scale,
            "debt": self.debt,
            "multiplier": self.multiplier,
            "rank": torch.tensor(self.basis.rank, device="cpu"),
        }
        # what is changed in place later must not change a state that was taken
        return {name: tensor.clone() for name, tensor in kept.items()}

    @classmethod
    @torch.no_grad()
    def of(cls, weight: ProtectedWeight) -> WeightState:
        """The state of a weight matrix whose present values are the consolidated ones."""
        anchor = weight.read().clone()
        columns = weight.columns()
        K = _covariances(weight, columns)
        wide = anchor.double()
        scale = (torch.bmm(wide, K) * wide).sum().clamp(min=1e-300)
        zero = torch.zeros_like(scale)
        basis = eigenbasis(K, anchor.dtype)
        return cls(columns, anchor, anchor, basis, scale, zero, zero.clone())

    @classmethod
    @torch.no_grad()
    def restored(cls, weight: ProtectedWeight, saved: Mapping[str, Tensor]) -> WeightState:
        """The state that was saved; the basis is computed anew."""
        device = weight.parameter.device
        tensors = {name: tensor.to(device, copy=True) for name, tensor in saved.items()}
        rank = int(tensors.pop("rank"))
        basis = eigenbasis(_covariances(weight, tensors["columns"]), tensors["anchor"].dtype, rank)
        if torch.equal(tensors["reference"], tensors["anchor"]):
            tensors["reference"] = tensors["anchor"]
        return cls(basis=basis, **tensors)

    @torch.no_grad()
    def carried_over(self, weight: ProtectedWeight) -> WeightState:
        """The state after blocks came, went or changed their slots.

        Weights of inputs that are no longer read are absorbed by those that are, in the anchor as
        in the reference; the least-squares error is orthogonal to all inputs that are read, so the
        drift from the new anchor and the debt simply add up. Bases of units whose inputs did not
        change are kept.
        """
        columns = weight.columns()
        if columns.shape == self.columns.shape and bool((columns == self.columns).all()):
            return self
        anchor, debt = self._move(weight, columns, self.anchor)
        reference = anchor
        if self.reference is not self.anchor:
            reference, _ = self._move(weight, columns, self.reference)
        if columns.shape == self.columns.shape:
            changed = (columns != self.columns).any(1).nonzero()[:, 0]
            K = _covariances(weight, columns[changed])
            fresh = eigenbasis(K, anchor.dtype, self.basis.rank)
            basis = Eigenbasis(*(t.clone() for t in self.basis))
            for old, new in zip(basis, fresh, strict=True):
                old[changed] = new
        else:
            basis = eigenbasis(_covariances(weight, columns), anchor.dtype)
        return replace(
            self,
            columns=columns,
            anchor=anchor,
            reference=reference,
            basis=basis,
            debt=self.debt + debt,
        )

    def _move(
        self, weight: ProtectedWeight, columns: Tensor, units: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Weights on the old columns as weights on the new ones, and the error's energy."""
        G, m, _ = units.shape
        n = weight.memory.covariance.n
        whole = units.new_zeros(G, m, n).scatter_(2, _per_row(self.columns, m), units)
        moved = whole.gather(2, _per_row(columns, m))
        whole.scatter_(2, _per_row(columns, m), 0.0)
        debt = torch.zeros_like(self.debt)
        left = whole.flatten(1).any(1).nonzero()[:, 0]
        if left.numel():
            K = weight.memory.covariance.dense().to(units.device)
            absorbed = absorb(K, columns[left], whole[left])
            moved[left] += absorbed.increment.to(moved)
            debt = absorbed.leftover.sum()
        return moved, debt


def _covariances(weight: ProtectedWeight, columns: Tensor) -> Tensor:
    """K[columns, columns] of every unit, float64 [G, n, n]."""
    return weight.memory.covariance.to(columns.device).restricted(columns)


def _per_row(columns: Tensor, m: int) -> Tensor:
    return columns[:, None].expand(-1, m, -1)
