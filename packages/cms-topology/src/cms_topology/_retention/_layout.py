"""Parameters as matrices that multiply inputs.

Legend: G groups of outputs that read inputs of their own, m outputs and n inputs of a group, k
elements of a kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Layout(NamedTuple):
    """How a dense parameter is cut into G matrices [m, n]."""

    groups: int = 1
    """G: of a convolution, or slices of a matrix that are multiplied with different inputs."""
    inputs_first: bool = False
    """[n, m], as in `x @ weight`, or [G n / k, m, k...], the kernels of a transposed convolution;
    else [G m, n...], as in `functional.linear` and convolutions."""
    stacked: bool = False
    """[G, m, n], or [G, n, m] with the inputs first: matrices side by side, as of experts."""

    def shape(self, whole: Sequence[int]) -> tuple[int, int, int]:
        """(G, m, n) of a parameter of this shape, which has three dimensions if it is stacked."""
        if self.stacked:
            m, n = reversed(whole[1:]) if self.inputs_first else whole[1:]
            return (whole[0], m, n)
        size = math.prod(whole[1:])
        if self.inputs_first:
            return (self.groups, whole[1], whole[0] * size // (whole[1] * self.groups))
        return (self.groups, whole[0] // self.groups, size)

    def alike(self, other: Layout) -> bool:
        """Whether parameters of both are cut alike, but for how many groups."""
        return self[1:] == other[1:]

    def matrices(self, parameter: Tensor) -> Tensor:
        """[G, m, n]; a view where one exists."""
        G, m, n = self.shape(parameter.shape)
        if self.stacked:
            return parameter.mT if self.inputs_first else parameter
        if self.inputs_first:
            apart = parameter.reshape(G, parameter.shape[0] // G, m, -1)
            return apart.transpose(1, 2).reshape(G, m, n)
        return parameter.reshape(G, m, n)

    def parameter(self, matrices: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of `matrices`."""
        if self.stacked:
            return matrices.mT if self.inputs_first else matrices
        if self.inputs_first:
            G, m, _ = matrices.shape
            apart = matrices.reshape(G, m, shape[0] // G, -1)
            return apart.transpose(1, 2).reshape(shape)
        return matrices.reshape(shape)


PLAIN = Layout()
"""One matrix [m, n]."""
