"""Which blocks an old task needs, what dropping one costs it, and how to make up for that.

Legend: R block rows, C block columns, k live blocks per row, B tile side, G row groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cms_topology._linear import CMSBlockLinear
from cms_topology._retention._bank import BlockBank
from cms_topology._retention._compensation import RIDGE, absorb
from cms_topology._retention._consolidation import LayerMemory
from cms_topology._retention._units import ProtectedWeight
from cms_topology._swap_retention import LiveBlocks


def removal_cost(layer: CMSBlockLinear, memory: LayerMemory, *, compensated: bool = True) -> Tensor:
    """What dropping each live block costs the consolidated tasks: float64 [R, k], nats per token.

    cost = 1/2 E[delta^2] tr(W_rc S W_rc^T), the second-order rise of the loss when the error
    signals delta and the output's error are independent. S = E[x_c x_c^T] if the block simply
    vanishes. If the other blocks of the row absorb its effect (`compensated`), only the part of x_c
    that they cannot predict counts: S = ((K^-1)_cc)^-1, the blockwise form of optimal brain surgeon
    (Hassibi & Stork 1993, eq. 5). Without error signals (`usage="none"`), E[delta^2] = 1.
    """
    weight = ProtectedWeight("", layer.values, memory, layer)
    G, _, n = weight.shape
    B, k = layer.B, n // layer.B
    K = memory.covariance.to(layer.values.device).restricted(weight.columns())
    if compensated:
        K.diagonal(dim1=1, dim2=2).add_(RIDGE * memory.covariance.diagonal().mean())
        K = torch.cholesky_inverse(torch.linalg.cholesky(K))
    tiles = K.view(G, k, B, k, B).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    if compensated:
        tiles = torch.linalg.inv(tiles)
    W = weight.read().double().view(G, layer.row_group, B, k, B)
    energy = torch.einsum("grikj,gkjl,grikl->grk", W, tiles, W).reshape(layer.R, k)
    error = 1.0 if memory.error is None else memory.error.double()[:, None].to(energy.device)
    return 0.5 * energy.clamp(min=0) * error * memory.energy.to(energy.device)


class RetentionRule:
    """Locks an old task's blocks at a decision, and compensates for those it lets go.

    Args:
        name: of the layer.
        memory: what is kept of it.
        drop_cost: a block of an old task may be dropped only if that costs at most this many nats
            per token (a row group's blocks together); 0 locks them all.
        compensate: let the other blocks of a row absorb what a dropped one did.
        bank: keeps what is dropped.
    """

    def __init__(
        self,
        name: str,
        memory: LayerMemory,
        *,
        drop_cost: float = 0.0,
        compensate: bool = True,
        bank: BlockBank | None = None,
    ) -> None:
        self.name, self.memory = name, memory
        self.drop_cost, self.compensate, self.bank = drop_cost, compensate, bank

    def locked_and_cost(self, layer: CMSBlockLinear) -> tuple[Tensor, Tensor]:
        """bool [R, k] blocks that must stay, and float32 [R, k] the cost of dropping each."""
        columns = layer.col_indices[:, : layer.num_live].long()
        theirs = torch.ones_like(columns, dtype=torch.bool)
        if self.memory.live is not None:
            theirs = self.memory.live.to(columns.device).gather(1, columns)
        if self.drop_cost == 0 and layer.scorer.loss is None:
            return theirs, torch.zeros(columns.shape, device=columns.device)  # nobody asks
        cost = removal_cost(layer, self.memory, compensated=self.compensate)
        group = cost.view(-1, layer.row_group, cost.shape[1]).sum(1)
        dear = group > self.drop_cost if self.drop_cost > 0 else torch.ones_like(group).bool()
        return theirs & dear.repeat_interleave(layer.row_group, 0), cost.float()

    @torch.no_grad()
    def after_swap(self, layer: CMSBlockLinear, swapped: Tensor, before: LiveBlocks) -> None:
        """Bank what was dropped, and let the row absorb what it did on the old tasks' inputs."""
        if self.bank is not None:
            self.bank.keep(self.name, swapped, before, int(layer.scorer.num_decisions))
        if not self.compensate or self.drop_cost == 0:
            return  # with all of theirs locked, only blocks of the present task can have gone
        weight = ProtectedWeight(self.name, layer.values, self.memory, layer)
        G, m, _ = weight.shape
        R, k, B, C = layer.R, layer.num_live, layer.B, layer.C
        gone = torch.where(swapped[:, :, None, None], before.values, 0.0)
        lost = gone.new_zeros(R, C, B, B)
        place = before.columns.long()[:, :, None, None].expand(-1, -1, B, B)
        lost.scatter_(1, place, gone)
        lost = lost.permute(0, 2, 1, 3).reshape(G, m, C * B)
        K = self.memory.covariance.dense().to(lost.device)
        increment = absorb(K, weight.columns(), lost).increment
        tiles = increment.view(R, B, k, B).permute(0, 2, 1, 3)
        layer.values[:, :k] += tiles.to(layer.values)
