"""What a model carries from one call to the next, so that tokens can come piece by piece.

Legend: S batch, H heads, P persistent tokens, W cached tokens, D head width.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from titanmac_integration._memory import MemoryState


class Cache(NamedTuple):
    """Keys and values of an attention layer that later tokens may still see, already rotated."""

    persistent: tuple[Tensor, Tensor]
    """[S, H, P, D] each"""
    near: tuple[Tensor, Tensor]
    """[S, H, W, D] each: the last tokens, at most ``window_size - 1``; with MAC of one segment."""
    retrieved: tuple[Tensor, Tensor] | None
    """[S, H, W, D] each: what those tokens retrieved; for MAC only."""


class LayerState(NamedTuple):
    """State of one block."""

    cache: Cache
    memory: MemoryState | None


class ModelState(NamedTuple):
    """State of a model after some tokens; made by ``model(tokens, return_state=True)``."""

    position: int
    """Tokens seen."""
    layers: tuple[LayerState, ...]

    def detach(self) -> ModelState:
        """The same values, cut off from the graph: for training over pieces of a long text."""
        return ModelState(self.position, tuple(_detach_layer(layer) for layer in self.layers))


def _detach_layer(layer: LayerState) -> LayerState:
    cache = Cache(
        *(
            None if pair is None else (pair[0].detach(), pair[1].detach())  # type: ignore[arg-type]
            for pair in layer.cache
        )
    )
    return LayerState(cache, None if layer.memory is None else layer.memory.detach())
