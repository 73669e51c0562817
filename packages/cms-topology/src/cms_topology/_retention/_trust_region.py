"""The nearest displacement whose drift is within a budget.

Legend: L layers, G units of a layer, n inputs of a unit.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

ITERATIONS = 5


def drift(spectrum: Tensor, energy: Tensor) -> Tensor:
    """tr(dW K dW^T) per layer from eigenvalues and the displacement's energy along them.

    Args:
        spectrum: float64 [L, G, n], eigenvalues of K.
        energy: float64 [L, G, n], sum over rows of the squared coefficients along each eigenvector.

    Returns:
        float64 [L].
    """
    return (spectrum * energy).sum((1, 2))


def multiplier(spectrum: Tensor, energy: Tensor, budget: Tensor, start: Tensor) -> Tensor:
    """The lambda >= 0 for which dW (I + lambda K)^-1 has a drift of at most `budget`.

    That is the Euclidean projection onto {dW: tr(dW K dW^T) <= budget}; lambda is its Lagrange
    multiplier. Found by Newton's method on 1/sqrt(budget) - 1/sqrt(drift(lambda)), which is
    nearly linear and concave: from the left it converges without overshooting, from the right its
    first step leads to the left (Moré & Sorensen 1983, section 3; Conn, Gould & Toint 2000,
    section 7.3). No host synchronisation.

    Args:
        spectrum, energy: as in `drift`.
        budget: float64 [L], greater than 0.
        start: float64 [L], where to begin: the last multiplier is a good guess.

    Returns:
        float64 [L].
    """
    s = spectrum.double().flatten(1)
    inside = s * energy.double().flatten(1)
    both = torch.stack((inside, inside * s))
    lam = start.double()
    for _ in range(ITERATIONS):
        shrunk = (1 + lam[:, None] * s).reciprocal()
        squared = shrunk.square()
        D, Q = (both * torch.stack((squared, squared * shrunk))).sum(2)
        step = D * ((D / budget).sqrt() - 1) / Q
        # where nothing drifts, 0/0: no step
        lam = (lam + torch.where(Q > 0, step, 0.0)).clamp(min=0)
    return lam


def shrink(
    spectrum: Tensor, energy: Tensor, budget: Tensor, start: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest displacement within the budget, as factors; on a GPU by one launch.

    What Newton's iterations leave over is scaled away, so that the drift after multiplication
    exceeds the budget by no more than rounding.

    Args:
        spectrum, energy, budget, start: as in `multiplier`, all float64.

    Returns:
        Factors [L, G, n] for the coefficients along each eigenvector, all ones where the drift is
        within the budget already; the multiplier [L]; and the drift [L] that is left.
    """
    kernel = _kernel() if spectrum.is_cuda else None
    if kernel is not None:
        found: tuple[Tensor, Tensor, Tensor] = kernel.shrink(
            spectrum, energy, budget, start, ITERATIONS
        )
        return found
    return shrink_by_torch(spectrum, energy, budget, start)


def shrink_by_torch(
    spectrum: Tensor, energy: Tensor, budget: Tensor, start: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, and the kernel's reference: some hundred launches."""
    lam = multiplier(spectrum, energy, budget, start)
    lam = torch.where(drift(spectrum, energy) > budget, lam, 0.0)
    factor = 1 / (1 + lam[:, None, None] * spectrum)
    left = drift(spectrum, energy * factor.square())
    scale = torch.where(left > budget, (budget / left).sqrt(), 1.0)
    # only what drifts is scaled
    factor = torch.where(spectrum > 0, factor * scale[:, None, None], 1.0)
    return factor, lam, left * scale.square()


@functools.cache
def _kernel() -> ModuleType | None:
    """`_trust_region_kernel`; None without Triton."""
    try:
        from cms_topology._retention import _trust_region_kernel
    except ImportError:
        return None
    return _trust_region_kernel
