"""Layers of one shape, projected together.

Legend: L layers, G units of a layer, m rows of a unit, n inputs of a unit; U [n, n] eigenvectors
and s [n] eigenvalues of the covariance of a unit's inputs, K = U diag(s) U^T.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cms_topology._retention._trust_region import drift, shrink
from cms_topology._retention._units import ProtectedWeight


class ProjectionBatch:
    """Keeps the weights of equally shaped layers inside what their memories allow.

    Two controls, either or both: the *update* since the last call is multiplied by
    eps (K + eps I)^-1, and the *displacement* from the anchor is projected onto a budget of drift.

    Args:
        weights: layers of one shape, dtype and device.
    """

    def __init__(self, weights: Sequence[ProtectedWeight]) -> None:
        self.weights = list(weights)
        self.anchor = self.read()
        self.reference = self.anchor
        """Weights when `project` was last done: the update is counted from here."""
        self.basis, self.spectrum = self._decompose(range(len(self.weights)))
        coefficients = self._to_basis(self.anchor)
        self.scale = drift(self.spectrum, _energy(coefficients)).clamp(min=1e-300)
        """float64 [L]: tr(W K W^T) of the anchor, the unit of relative drift."""
        self.last_drift = torch.zeros_like(self.scale)
        self.last_multiplier = torch.zeros_like(self.scale)

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
    def project(self, eps: Tensor | None, budget: Tensor | None) -> None:
        """Replace the weights by what the controls leave of them; no host synchronisation.

        Args:
            eps: float64 [L] or None: no control of the update.
            budget: relative drift, float64 [L] or None: no control of the displacement.
        """
        now = self.read()
        moved = now - self.anchor
        coefficients = self._to_basis(moved)
        changed = None
        if eps is not None:
            update = self._to_basis(now - self.reference)
            # removed share s / (s + eps): exact for eps = 0 too, where a direction without energy
            # stays free
            removed = self.spectrum / (self.spectrum + eps[:, None, None]).clamp(min=1e-300)
            coefficients = coefficients - update * removed[:, :, None].to(update)
        energy = _energy(coefficients)
        if budget is not None:
            factor, self.last_multiplier = shrink(self.spectrum, energy, budget * self.scale)
            if eps is None:
                changed = self.last_multiplier > 0
            coefficients = coefficients * factor[:, :, None].to(coefficients)
            energy = energy * factor.square()
        self.last_drift = drift(self.spectrum, energy) / self.scale
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
        return drift(self.spectrum, energy) / self.scale

    def _write(self, result: Tensor) -> None:
        for weight, units, anchor in zip(self.weights, result, self.anchor, strict=True):
            if weight.rows is not None:
                units[0, weight.rows] = anchor[0, weight.rows]
            weight.write(units)

    def _to_basis(self, moved: Tensor) -> Tensor:
        return _bmm(moved, self.basis)

    def _from_basis(self, coefficients: Tensor) -> Tensor:
        return _bmm(coefficients, self.basis.mT)

    def _decompose(self, members: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Eigenvectors [L, G, n, n] in the weights' precision, eigenvalues [L, G, n] in float64."""
        vectors, values = [], []
        for i in members:
            weight = self.weights[i]
            K = weight.memory.covariance.to(weight.parameter.device)
            s, U = torch.linalg.eigh(K.restricted(weight.columns()))
            # below the rounding of the largest, an eigenvalue is noise around zero
            floor = 1e-12 * s[:, -1:].clamp(min=0)
            values.append(torch.where(s > floor, s, 0.0))
            vectors.append(U.to(self.anchor.dtype))
        return torch.stack(vectors), torch.stack(values)


def _energy(coefficients: Tensor) -> Tensor:
    """Sum over the rows of the squares: [L, G, m, n] -> float64 [L, G, n]."""
    return coefficients.square().sum(2).double()


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).view(a.shape)
