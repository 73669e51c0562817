"""What is measured: shapes, densities, tiles, row groups; and the operands of one case.

Legend: R block rows, C block columns, K blocks per row, B tile side, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blockell_format import (
    TransposedIndex,
    create_random_topology,
    num_blocks_for_density,
    to_dense,
    transposed_index,
)

MODES = ("forward", "training")
RUNS = ("eager", "graph", "compile")


@dataclass(frozen=True, kw_only=True)
class BenchCase:
    """One line of a table, for all contenders."""

    tokens: int
    in_features: int
    out_features: int
    tile: int
    row_group: int
    density: float
    mode: str
    """"forward": under no_grad; "training": forward, and gradients of input, weight and bias."""
    run: str = "eager"
    """"eager", "graph" (a CUDA graph's replay) or "compile" (torch.compile of the forward pass)."""
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def live_density(self) -> float:
        """The density asked for, rounded to whole blocks."""
        C = self.in_features // self.tile
        return num_blocks_for_density(C, self.density) / C

    @property
    def impossible(self) -> str | None:
        """Why the case cannot be built, or None."""
        for name in ("in_features", "out_features"):
            if getattr(self, name) % self.tile:
                return f"{name} is no multiple of the tile"
        if self.out_features // self.tile % self.row_group:
            return "the row group does not divide the block rows"
        if self.run == "graph" and torch.device(self.device).type != "cuda":
            return "CUDA graphs need a CUDA device"
        return None


@dataclass
class BenchOperands:
    """Random operands of a case (zeros would be faster than life)."""

    x: Tensor  # [N, C*B]
    values: Tensor  # [R, K, B, B]
    col_indices: Tensor  # int32 [R, K]
    bias: Tensor  # [R*B]
    dy: Tensor  # [N, R*B]
    dense: Tensor  # [R*B, C*B]
    mask: Tensor  # [R*B, C*B], 0 or 1
    index: TransposedIndex


def make_operands(case: BenchCase, seed: int = 0) -> BenchOperands:
    """The same case and seed give the same operands. Tensors that train require gradients."""
    B, R, C = case.tile, case.out_features // case.tile, case.in_features // case.tile
    K = num_blocks_for_density(C, case.density)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(case.device, case.dtype)

    cols = create_random_topology(R, C, K, generator, case.row_group).to(case.device)
    values = normal(R, K, B, B)
    operands = BenchOperands(
        x=normal(case.tokens, case.in_features),
        values=values,
        col_indices=cols,
        bias=normal(case.out_features),
        dy=normal(case.tokens, case.out_features),
        dense=to_dense(values, cols, R, C, K, B),
        mask=to_dense(torch.ones_like(values), cols, R, C, K, B),
        index=transposed_index(cols, C),
    )
    if case.mode == "training":
        for t in (operands.x, operands.values, operands.bias, operands.dense):
            t.requires_grad_()
    return operands
