"""Weight matrices as stacks of independent units: rows that read the same inputs.

Legend: R block rows, K live blocks per row, B tile side, G units of a layer, m rows of a unit, n
inputs of a unit. A dense matrix, or a convolution's kernels as one, is one unit of all its rows, or
one per group; a block-sparse layer has one unit per row group, of m = row_group * B rows that read
n = K * B inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cms_topology._linear import CMSBlockLinear
from cms_topology._retention._consolidation import LayerMemory
from cms_topology._retention._layout import Layout


@dataclass(frozen=True, eq=False)
class ProtectedWeight:
    """One weight matrix, its memory, and how it is cut into units."""

    name: str
    parameter: Tensor
    memory: LayerMemory
    layer: CMSBlockLinear | None = None
    """The block-sparse layer the parameter is the `values` of; None for a dense matrix."""
    rows: Tensor | None = None
    """int64 indices of rows that must stay: embedding rows in use of a tied matrix."""

    def gradient(self) -> ProtectedWeight | None:
        """The parameter's gradient, cut into the same units; None if there is none now."""
        grad = self.parameter.grad
        return None if grad is None else replace(self, parameter=grad)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(G, m, n)."""
        if self.layer is None:
            return self._layout.shape(self.parameter.shape)
        group = self.layer.row_group
        return self.layer.R // group, group * self.layer.B, self.layer.num_live * self.layer.B

    @property
    def _layout(self) -> Layout:
        return self.memory.layout

    def columns(self) -> Tensor:
        """Inputs that each unit reads, int64 [G, n]."""
        G, _, n = self.shape
        if self.layer is None:
            return torch.arange(n, device=self.parameter.device).repeat(G, 1)
        blocks = self.layer.col_indices[:: self.layer.row_group, : self.layer.num_live].long()
        within = torch.arange(self.layer.B, device=blocks.device)
        return (blocks[:, :, None] * self.layer.B + within).view(G, n)

    def read(self) -> Tensor:
        """The weights, float32 [G, m, n] (float64 for a float64 model); a copy."""
        wide = torch.float64 if self.parameter.dtype == torch.float64 else torch.float32
        units = torch.empty(self.shape, dtype=wide, device=self.parameter.device)
        read_all([self], units[None])
        return units

    def _read(self, units: Tensor) -> tuple[Tensor, Tensor]:
        """Views: what has to be copied where, so that a contiguous [G, m, n] holds the weights."""
        if self.layer is None:
            return units, self._layout.matrices(self.parameter)
        R, K, B = self.layer.R, self.layer.num_live, self.layer.B
        return units.view(R, B, K, B), self.parameter[:, :K].permute(0, 2, 1, 3)

    def _write(self, units: Tensor) -> tuple[Tensor, Tensor]:
        """The same for the way back."""
        if self.layer is None:
            return self.parameter, self._layout.parameter(units, self.parameter.shape)
        R, K, B = self.layer.R, self.layer.num_live, self.layer.B
        return self.parameter[:, :K], units.reshape(R, B, K, B).permute(0, 2, 1, 3)

    def still(self) -> Tensor | None:
        """Bool [G m]: which of the matrices' rows are `rows`; None if there are none, or if they
        are columns there."""
        if self.rows is None or self._layout.inputs_first:
            return None
        G, m, _ = self.shape
        still = torch.zeros(G * m, dtype=torch.bool, device=self.parameter.device)
        return still.index_fill_(0, self.rows, True)

    def keep_rows(self, units: Tensor, kept: Tensor) -> None:
        """Copy the `rows` of the parameter from `kept` to `units`, both contiguous [G, m, n]."""
        if self.rows is None:
            return
        if self._layout.inputs_first:
            units[0, :, self.rows] = kept[0, :, self.rows]
        else:
            units.flatten(0, 1)[self.rows] = kept.flatten(0, 1)[self.rows]


@torch.no_grad()
def read_all(weights: Sequence[ProtectedWeight], units: Tensor) -> None:
    """Copy weights of one shape to a contiguous [L, G, m, n]; dense ones by few launches."""
    into, values = zip(*(w._read(u) for w, u in zip(weights, units, strict=True)), strict=True)
    torch._foreach_copy_(into, values)


@torch.no_grad()
def stacked(weights: Sequence[ProtectedWeight], like: Tensor) -> Tensor:
    """Weights of one shape, [L, G, m, n] in the precision of `like`; to be read only, since a
    dense one by itself is not copied."""
    if len(weights) == 1 and weights[0].layer is None:
        return weights[0]._layout.matrices(weights[0].parameter)[None].to(like.dtype)
    units = like.new_empty(len(weights), *weights[0].shape)
    read_all(weights, units)
    return units


@torch.no_grad()
def write_all(weights: Sequence[ProtectedWeight], units: Tensor) -> None:
    """The inverse."""
    into, values = zip(*(w._write(u) for w, u in zip(weights, units, strict=True)), strict=True)
    torch._foreach_copy_(into, values)
