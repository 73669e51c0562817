"""Dropped blocks, kept so that they can come back.

Legend: R block rows, k live blocks per row, B tile side.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cms_topology._birth import reset_optimizer_state
from cms_topology._linear import CMSBlockLinear
from cms_topology._swap_retention import LiveBlocks


@dataclass(frozen=True, eq=False)
class BankedBlock:
    """One dropped block."""

    layer: str
    """Name of its layer."""
    row: int
    """Block row."""
    column: int
    """Block column."""
    values: Tensor
    """[B, B], to the bit, on the CPU."""
    age: int
    """Optimizer steps it had lived."""
    decision: int
    """Number of the decision that dropped it, in its layer."""
    task: str
    """The task during which it was dropped."""


class BlockBank:
    """Keeps dropped blocks, the latest `capacity` of them, and puts them back on demand.

    Keeping waits for the device once per layer and decision.

    Args:
        capacity: blocks kept in all; the oldest go first.
    """

    def __init__(self, capacity: int = 4096) -> None:
        if capacity < 1:
            raise ValueError(f"capacity (={capacity}) must be at least 1.")
        self._blocks: deque[BankedBlock] = deque(maxlen=capacity)
        self.task = ""
        """Name of the present task, written to the blocks that are dropped."""

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def blocks(self) -> list[BankedBlock]:
        """What is kept, oldest first."""
        return list(self._blocks)

    @property
    def num_bytes(self) -> int:
        """Bytes of the kept weights."""
        return sum(b.values.numel() * b.values.element_size() for b in self._blocks)

    @torch.no_grad()
    def keep(self, name: str, swapped: Tensor, before: LiveBlocks, decision: int) -> None:
        """Take in the blocks a decision has dropped.

        Args:
            name: of the layer.
            swapped: bool [R, k], slots that were replaced.
            before: the layer's live blocks before the decision.
            decision: its number.
        """
        places = swapped.nonzero().tolist()
        if not places:
            return
        tiles, cols = before.values[swapped].cpu(), before.columns[swapped].tolist()
        ages = before.ages[swapped].tolist()
        for (row, _), tile, column, age in zip(places, tiles, cols, ages, strict=True):
            self._blocks.append(
                BankedBlock(name, row, int(column), tile.clone(), int(age), decision, self.task)
            )

    @torch.no_grad()
    def recall(
        self,
        name: str,
        layer: CMSBlockLinear,
        *,
        task: str | None = None,
        optimizers: Iterable[torch.optim.Optimizer] = (),
    ) -> int:
        """Put back kept blocks whose position is alive again but young, newest copy first.

        A block comes back where its row holds its column now (after `grow`, for example): its
        weights are written over those of the newcomer, its optimizer state starts afresh, and it
        leaves the bank.

        Args:
            name: of the layer.
            layer: changed in place.
            task: only blocks dropped during this task; None: all.
            optimizers: whose state of the recalled slots is reset.

        Returns:
            Number of blocks put back.
        """
        slots = {
            (row, int(column)): slot
            for row, columns in enumerate(layer.col_indices[:, : layer.num_live].tolist())
            for slot, column in enumerate(columns)
        }
        mask = torch.zeros(layer.R, layer.num_live, dtype=torch.bool, device="cpu")
        for block in reversed(self.blocks):
            slot = slots.pop((block.row, block.column), None) if block.layer == name else None
            if slot is None or (task is not None and block.task != task):
                continue
            layer.values[block.row, slot] = block.values.to(layer.values)
            mask[block.row, slot] = True
            self._blocks.remove(block)
        reset_optimizer_state(optimizers, layer.values, mask.to(layer.values.device))
        return int(mask.sum())

    def state_dict(self) -> dict[str, Any]:
        """Everything kept, as plain containers and tensors."""
        return {"task": self.task, "blocks": [dict(vars(block)) for block in self._blocks]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep what `state` kept."""
        self.task = state["task"]
        self._blocks.clear()
        self._blocks.extend(BankedBlock(**block) for block in state["blocks"])
