"""What a decision asks of those who keep an old task.

Legend: R block rows, k live slots per row, B tile side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from cms_topology._linear import CMSBlockLinear


class LiveBlocks(NamedTuple):
    """The live blocks of a layer at one moment."""

    columns: Tensor
    """int32 [R, k]."""
    values: Tensor
    """[R, k, B, B]."""
    ages: Tensor
    """int32 [R, k], optimizer steps since birth."""


class SwapRetention(Protocol):
    """What a decision asks of those who keep an old task; see `TopologyManager(retention=...)`."""

    def locked_and_cost(self, layer: CMSBlockLinear) -> tuple[Tensor, Tensor]:
        """bool [R, k] live blocks that must stay, and float [R, k] what dropping each costs."""
        ...

    def after_swap(self, layer: CMSBlockLinear, swapped: Tensor, before: LiveBlocks) -> None:
        """Make up for what was dropped; `swapped` is bool [R, k]."""
        ...
