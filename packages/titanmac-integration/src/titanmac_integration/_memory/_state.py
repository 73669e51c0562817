"""What a memory carries from one token to the next: plain tensors, never a parameter written to."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

Weights = tuple[Tensor, ...]
"""Matrices of a memory: one [S, H, D, D] for depth 1; [S, H, D, E], [S, H, E, D] for depth 2."""


class MemoryState(NamedTuple):
    """Memory of one layer after some tokens; S batch, H memory heads, D width, E hidden width."""

    weights: Weights
    """M: what is read."""
    momentum: Weights
    """S: the decaying sum of past steps, shaped like ``weights``."""
    anchor: Weights
    """M at the start of the current chunk, where depth 2 takes its gradients."""
    segment: Weights
    """M at the start of the current segment, which MAC retrieves from."""
    convolution: Tensor
    """The last inputs of the short convolution [S, taps - 1, 3 H D]."""

    def detach(self) -> MemoryState:
        """The same values, cut off from the graph."""
        weights, momentum, anchor, segment = (
            tuple(tensor.detach() for tensor in part)
            for part in (self.weights, self.momentum, self.anchor, self.segment)
        )
        return MemoryState(weights, momentum, anchor, segment, self.convolution.detach())
