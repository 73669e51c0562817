"""What a decision did, and what a layer looks like."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TopologyDecisionResult:
    """Outcome of one topology decision of one layer.

    The tensors stay on the layer's device; the properties copy them to the host when they are
    read for the first time, so a result that nobody reads costs nothing.
    """

    swapped: Tensor
    """bool [R, K]: live slots whose block was replaced."""
    old_columns: Tensor
    """int32 [R, K]: columns before the decision."""
    new_columns: Tensor
    """int32 [R, K]: columns after the decision."""
    global_step: int | None = None
    """Optimizer step of the decision, if the caller said so."""
    _host: dict[str, int] = field(default_factory=dict, repr=False)

    @property
    def num_swaps(self) -> int:
        """Number of blocks that were replaced."""
        if "num_swaps" not in self._host:
            self._host["num_swaps"] = int(self.swapped.sum())
        return self._host["num_swaps"]

    @property
    def swap_rate(self) -> float:
        """Share of the layer's live blocks that were replaced, in [0, 1]."""
        return self.num_swaps / self.swapped.numel()

    @cached_property
    def pruned_positions(self) -> list[tuple[int, int]]:
        """(block row, slot) of every replaced block, in row-major order."""
        return [(int(row), int(slot)) for row, slot in self.swapped.nonzero().tolist()]

    @cached_property
    def pruned_columns(self) -> list[int]:
        """Block columns of the blocks that left, in the order of `pruned_positions`."""
        return [int(column) for column in self.old_columns[self.swapped].tolist()]

    @cached_property
    def grown_columns(self) -> list[int]:
        """Block columns of the blocks that arrived, in the order of `pruned_positions`."""
        return [int(column) for column in self.new_columns[self.swapped].tolist()]


def count_swaps(results: Iterable[TopologyDecisionResult]) -> None:
    """Let every result know its number of swaps, waiting for the device once instead of often."""
    unknown = [result for result in results if "num_swaps" not in result._host]
    if not unknown:
        return
    device = unknown[0].swapped.device  # a model may be on several
    counts = torch.stack([result.swapped.sum().to(device) for result in unknown]).tolist()
    for result, count in zip(unknown, counts, strict=True):
        result._host["num_swaps"] = int(count)


class TopologyStats(NamedTuple):
    """Summary of a layer's topology."""

    density: float
    """Live blocks over all positions."""
    avg_block_score: float
    """Mean keep score of the live blocks."""
    avg_block_age: float
    """Mean age of the live blocks in optimizer steps."""
    column_entropy: float
    """Entropy of column usage over log C, in [0, 1]; 1 is perfectly even."""
    num_blocks: int
    """Number of live blocks."""


class AgeHistogram(NamedTuple):
    """Histogram of block ages."""

    counts: npt.NDArray[np.int64]
    """[bins] number of live blocks."""
    edges_steps: npt.NDArray[np.float64]
    """[bins + 1] bin edges in optimizer steps."""
