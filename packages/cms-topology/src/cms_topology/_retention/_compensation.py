"""What the remaining inputs of a row can take over from those that left.

Legend: G units (rows that read the same inputs), m rows of a unit, k inputs it reads, n inputs of
the layer; K [n, n] covariance of the inputs on the consolidated tasks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

RIDGE = 1e-4
"""Added to the diagonal, in units of the inputs' mean energy: least squares on a sample of tokens
would otherwise fit what does not generalise."""


class Absorption(NamedTuple):
    """How the inputs that are read make up for weights on inputs that are not."""

    increment: Tensor
    """[G, m, k]: to add to the weights of the inputs that are read."""
    leftover: Tensor
    """[G]: energy of the outputs' error that remains, sum over the rows of E[(dw x)^2]."""


def absorb(K: Tensor, columns: Tensor, lost: Tensor, ridge: float = RIDGE) -> Absorption:
    """Least squares: the increment X on `columns` that minimises E|lost x - X x_columns|^2.

    X = lost K[:, c] (K[c, c] + ridge I)^-1: the step that optimal brain surgeon takes (Hassibi &
    Stork 1993, eq. 5), for many weights at once and with the layer's own least squares as the loss.

    Args:
        K: [n, n], its mean diagonal the unit of `ridge`.
        columns: int64 [G, k], inputs that are read.
        lost: [G, m, n] weights that are gone; zero on `columns`.
        ridge: see above.
    """
    wide = K.double()
    gone = lost.double()
    image = gone @ wide
    target = image.gather(2, columns[:, None].expand(-1, gone.shape[1], -1))
    inside = wide[columns[:, :, None], columns[:, None, :]]
    ridged = inside + ridge * wide.diagonal().mean() * torch.eye(
        columns.shape[1], dtype=wide.dtype, device=wide.device
    )
    factor = torch.linalg.cholesky(ridged)
    X = torch.cholesky_solve(target.mT, factor).mT
    leftover = (image * gone).sum((1, 2)) - ((2 * target - X @ inside) * X).sum((1, 2))
    return Absorption(X, leftover.clamp(min=0))
