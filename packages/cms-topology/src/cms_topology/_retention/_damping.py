"""Gradients damped along the directions that old tasks use, before an optimizer sees them.

Legend: L layers, G units of a layer, m rows of a unit, n inputs of a unit, r leading directions U
[n, r] of a unit's inputs with eigenvalues s [r]; the directions beside them share one eigenvalue.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cms_topology._retention._precision import products

NEGLIGIBLE = 0.05
"""Directions of which a smaller share would be taken away are left alone."""


class Damping:
    """Multiplies by eps (K + eps I)^-1, but for directions it would hardly touch.

    With few directions that is two thin products, with many one by the matrix itself, which is
    then kept; it holds for the `eps` it was made for. A larger one takes the two products.

    Args:
        spectrum: float64 [L, G, r + 1], eigenvalues along the leading directions and all others.
        vectors: [L, G, n, r].
        eps: the smallest that will be asked for.
    """

    def __init__(self, spectrum: Tensor, vectors: Tensor, eps: float) -> None:
        self.eps = eps
        self._spectrum = spectrum
        # the eps, here or larger, at which a direction differs most from those beside all
        leading, rest = spectrum[:, :, :-1], spectrum[:, :, -1:]
        worst = (leading * rest).sqrt().clamp(min=max(eps, 1e-300))
        apart = leading / (leading + worst) - rest / (rest + worst)
        self._count = int((apart > NEGLIGIBLE).any(0).any(0).sum())
        self._vectors = vectors[..., : self._count].contiguous()
        self._matrix: Tensor | None = None
        if 2 * self._count > vectors.shape[2]:
            with products(full=True):
                self._matrix = self._factor(eps)

    def __call__(self, units: Tensor, eps: float, layers: list[int] | None = None) -> Tensor:
        """What is left of gradients [L', G, m, n]; `layers` says whose they are, None: all."""
        which = slice(None) if layers is None else layers
        if self._matrix is not None and eps == self.eps:
            return torch.matmul(units, self._matrix[which])
        along, outside = (per_row(share, units)[which] for share in self._shares(eps))
        vectors = self._vectors[which]
        C = torch.matmul(units, vectors) * along[..., : self._count]
        flat = (t.flatten(0, 1) for t in (units * (1 - outside), C, vectors.mT))
        return torch.baddbmm(*flat, alpha=-1).view(units.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes held beside the directions that were given."""
        return 0 if self._matrix is None else self._matrix.numel() * self._matrix.element_size()

    def _shares(self, eps: float) -> tuple[Tensor, Tensor]:
        """What is taken away along each leading direction beyond that of all others, and that."""
        share = self._spectrum / (self._spectrum + eps).clamp(min=1e-300)
        along, outside = share[:, :, :-1], share[:, :, -1:]
        return along - outside, outside

    def _factor(self, eps: float) -> Tensor:
        """The matrix itself, [L, G, n, n]."""
        along, outside = (per_row(share, self._vectors) for share in self._shares(eps))
        taken = (self._vectors * along[..., : self._count]) @ self._vectors.mT
        diagonal = (1 - outside).expand(*taken.shape[:2], 1, taken.shape[3])
        return torch.diag_embed(diagonal[:, :, 0]).sub_(taken)


def per_row(factor: Tensor, like: Tensor) -> Tensor:
    """[L, G, k] -> [L, G, 1, k] in the weights' precision."""
    return factor[:, :, None].to(like)
