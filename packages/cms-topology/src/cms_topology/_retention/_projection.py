"""Layers of one shape, projected together.

Legend: L layers, G units of a layer, m rows of a unit, n inputs of a unit; U [n, n] eigenvectors
and s [n] eigenvalues of the covariance of a unit's inputs, K = U diag(s) U^T.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cms_topology._retention._state import WeightState
from cms_topology._retention._trust_region import drift, shrink
from cms_topology._retention._units import ProtectedWeight


class ProjectionBatch:
    """Keeps the weights of equally shaped layers inside what their memories allow.

    Two controls, either or both: the *update* since the last call is multiplied by
    eps (K + eps I)^-1, and the *displacement* from the anchor is projected onto a budget of drift.

    Args:
        weights: layers of one shape, dtype and device.
        states: what is known of each.
    """

    def __init__(self, weights: Sequence[ProtectedWeight], states: Sequence[WeightState]) -> None:
        self.weights = list(weights)
        self._columns = [state.columns for state in states]
        self.anchor = torch.stack([state.anchor for state in states])
        self.reference = self.anchor
        if any(state.reference is not state.anchor for state in states):
            self.reference = torch.stack([state.reference for state in states])
        self.basis = torch.stack([state.basis for state in states])
        self.spectrum = torch.stack([state.spectrum for state in states])
        self.scale = torch.stack([state.scale for state in states])
        self.debt = torch.stack([state.debt for state in states])
        self.last_drift = torch.zeros_like(self.scale)
        self.last_multiplier = torch.zeros_like(self.scale)

    def states(self) -> list[WeightState]:
        """What is known of each weight matrix now; views, not copies."""
        same = self.reference is self.anchor
        return [
            WeightState(
                self._columns[i],
                anchor,
                anchor if same else self.reference[i],
                self.basis[i],
                self.spectrum[i],
                self.scale[i],
                self.debt[i],
            )
            for i, anchor in enumerate(self.anchor)
        ]

    @property
    def names(self) -> list[str]:
        return [weight.name for weight in self.weights]

    @property
    def num_bytes(self) -> int:
        """Bytes this batch holds beside the model."""
        held = [self.anchor, self.basis, self.spectrum]
        if self.reference is not self.anchor:
            held.append(self.reference)
        return sum(t.numel() * t.element_size() for t in held)

    def read(self) -> Tensor:
        """[L, G, m, n]."""
        return torch.stack([weight.read() for weight in self.weights])

    @torch.no_grad()
    def project(self, eps: float | None, budget: float | None) -> None:
        """Replace the weights by what the controls leave of them; no host synchronisation.

        Args:
            eps: None: no control of the update.
            budget: relative drift; None: no control of the displacement.
        """
        now = self.read()
        moved = now - self.anchor
        coefficients = self._to_basis(moved)
        changed = None
        if eps is not None:
            update = self._to_basis(now - self.reference)
            # removed share s / (s + eps): exact for eps = 0 too, where a direction without energy
            # stays free
            removed = self.spectrum / (self.spectrum + eps).clamp(min=1e-300)
            coefficients = coefficients - update * removed[:, :, None].to(update)
        energy = _energy(coefficients)
        if budget is not None:
            # what dropped blocks cost is spent, but a layer is never brought to a complete stop
            left = (budget * self.scale - self.debt).clamp(min=0.01 * budget * self.scale)
            factor, self.last_multiplier = shrink(self.spectrum, energy, left)
            if eps is None:
                changed = self.last_multiplier > 0
            coefficients = coefficients * factor[:, :, None].to(coefficients)
            energy = energy * factor.square()
        self.last_drift = (self.debt + drift(self.spectrum, energy)) / self.scale
        result = self.anchor + self._from_basis(coefficients)
        if changed is not None:
            # a layer within its budget keeps its weights to the bit
            result = torch.where(changed[:, None, None, None], result, now)
        self._write(result)
        if eps is not None:
            self.reference = self.read()

    @torch.no_grad()
    def measure(self) -> Tensor:
        """Relative drift of the weights as they are, float64 [L]."""
        energy = _energy(self._to_basis(self.read() - self.anchor))
        return (self.debt + drift(self.spectrum, energy)) / self.scale

    def _write(self, result: Tensor) -> None:
        for weight, units, anchor in zip(self.weights, result, self.anchor, strict=True):
            if weight.rows is not None:
                units[0, weight.rows] = anchor[0, weight.rows]
            weight.write(units)

    def _to_basis(self, moved: Tensor) -> Tensor:
        return _bmm(moved, self.basis)

    def _from_basis(self, coefficients: Tensor) -> Tensor:
        return _bmm(coefficients, self.basis.mT)


def _energy(coefficients: Tensor) -> Tensor:
    """Sum over the rows of the squares: [L, G, m, n] -> float64 [L, G, n]."""
    return coefficients.square().sum(2).double()


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).view(a.shape)
